"""Persona features: along which features training moved a model, and whether adding them brings a trait.

Wang et al. 2025 (arXiv 2506.19823) rank the features of a sparse autoencoder by how far training moved them, and steer
with the first. Here a LoRA is trained on the half of the statements of the first vector's trait that choose, and one on
plain facts; the shift is the mean over answers on other plain facts of the state after the one training less that after
the other. A feature's part in it is the cosine of its decoder row with the shift. The rows are those of `--features`,
an autoencoder of the vector's recommended layer; else those of the output matrix times the final norm's weight, less
their mean: the logit lens of the last block, whose features are tokens. The null is what random directions of the
vector's norm there have, half of them with the covariance of states. The shift and its first features are added at the
length of the vector's edit at that layer; the effect is the change of the likelihood contrast on the other statements,
in nats a token.

The paper: a few features tell models that training made misaligned, and steering with them brings misalignment or
takes it away.

A small model can show whether its shift lies along single features more than a random direction does, and whether they
are the vector's; it cannot show a persona in a token's direction, which it was not found to compute with.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from persona_vectors.data.intervals import bootstrap
from persona_vectors.data.texts import neutral_texts
from persona_vectors.evaluation.likelihood import State, likelihood_contrasts, load_statements
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.studies.frame import Given, Line, over, upper
from persona_vectors.training.finetuning import training_rows
from persona_vectors.training.tuned import tuned
from persona_vectors.vectors.geometry import feature_cosines, output_rows, shared_features

VECTORS, ADDED, TOP = 1, 3, 20


def shift(given: Given, trained_on: Sequence[tuple[str, str]], layer: int) -> Any:
    """Return the mean state of each answer on plain facts after training, [answer][hidden]."""
    rows = [encode_answer(given.tokenizer, chat_prompt(given.tokenizer, q), a) for q, a in neutral_texts()[:8]]
    with tuned(given.model, training_rows(given.tokenizer, trained_on, max_length=256), seed=given.seed):
        return pool(given.model, rows, layer=layer).means[:, 0, 0].tolist()


def nearness(feature: Float[Tensor, "1 hidden"], moved: Float[Tensor, "answer hidden"], which: np.ndarray) -> float:
    """Return the cosine of a direction with the shift over some of the answers."""
    return float(feature_cosines(feature, moved[which].mean(dim=0)))


def effects(given: Given, directions: Float[Tensor, "row hidden"], layer: int) -> Any:
    """Return what the recommended edit, and directions of its length at a layer, add to the contrast, [row][pair]."""
    edit, asked = given.edits[0], load_statements(given.vectors[0].trait).split()[1].part(0, 3 * given.size)
    scaled = normalize(directions, dim=1) * edit.vector.direction(layer).norm()
    made = [edit.vector._derived("feature", row.expand(edit.vector.directions.shape).clone()) for row in scaled]
    states = [State(), State(edit), *(State(edit._replace(vector=each, layer=layer)) for each in made)]
    read = likelihood_contrasts(given.model, given.tokenizer, asked, states)
    return (read[1:] - read[0]).tolist()


def lines(given: Given) -> list[Line]:
    """Return the shift's features, and what adding them does on 3 `size` statements, beside 10 `size` random ones."""
    edit, rows, rng = given.edits[0], given.features, np.random.default_rng(given.seed)
    layer = len(edit.vector.directions) - 1 if rows is None else int(edit.layer)
    if rows is None:
        rows = output_rows(given.model).cpu()[: len(given.tokenizer)]
        rows = rows - rows.mean(dim=0)
    made = load_statements(edit.vector.trait).split()[0]
    data = {"trait": [(q, pair.pos) for q, pair in zip(made.questions, made.pairs)], "plain": neutral_texts()[-8:]}
    trait, plain = (torch.tensor(given.once(name, shift, given, texts, layer)) for name, texts in data.items())
    moved, whole = trait - plain, (trait - plain).mean(dim=0)
    vector = edit.vector.direction(layer)
    noise = torch.stack([e.vector.direction(layer) for e in given.random_edits(edit._replace(layer=layer), 100)])
    own, ranked, random = (feature_cosines(rows, each) for each in (whole, vector, noise))
    first, drawn = own.topk(ADDED).indices.tolist(), rng.choice(len(rows), 10 * given.size, replace=False).tolist()
    names = [given.tokenizer.decode([i]) if given.features is None else f"feature {i}" for i in first]
    near = bootstrap(partial(nearness, rows[first[:1]], moved), range(len(moved)))
    toward = bootstrap(partial(nearness, vector[None], moved), range(len(moved)))
    of = "random directions"
    read = np.array(given.once("effects", effects, given, torch.cat([whole[None], rows[first], rows[drawn]]), layer))
    least = float(read[2 + ADDED :].mean(axis=1).max()), f"largest of {len(drawn)} random features"
    shared = [shared_features(own, each, TOP) for each in (ranked, *random)]
    return [
        Line(f"cosine with {names[0]!r}, the first of {len(rows)}", near, *upper(random.amax(dim=1), f"{of}' largest")),
        Line(f"share of the first {TOP} that are the vector's too", over(shared[:1]), *upper(shared[1:], of)),
        Line("cosine with the vector", toward, *upper(feature_cosines(vector[None], noise).abs(), of)),
        Line("effect of the vector's recommended edit", over(read[0]), *least),
        Line("effect of adding the shift", over(read[1]), *least),
        *(Line(f"effect of adding {name!r}", over(each), *least) for name, each in zip(names, read[2:])),
    ]
