"""Persona features: along which features training moved a model, and whether adding them brings a trait.

Wang et al. 2025 (arXiv 2506.19823) rank the features of a sparse autoencoder by how far training moved them, and steer
with the first. Here a LoRA is trained on the half of the statements of the first vector's trait that choose, and the
shift is the mean over answers on plain facts of the state after training less that before, at the vector's layer. A
feature's part in it is the cosine of its decoder row with the shift. The rows are those of `--features`, an
autoencoder of that layer; else those of the output matrix times the final norm's weight, less their mean: the logit
lens, whose features are tokens. Beside it stands a LoRA on plain facts, and the null is what random directions of the
vector's norm have, half of them with the covariance of states. The first three features are added at the length of
the recommended edit; the effect is the change of the likelihood contrast on the other statements, in nats a token.

The paper: a few features tell models that training made misaligned, and steering with them brings misalignment or
takes it away.

A small model can show whether its shift lies along single features more than a random direction does; it cannot show
a persona in one, as the tokens' directions are no features that it was found to compute with.
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


def shift(given: Given, trained_on: Sequence[tuple[str, str]]) -> Any:
    """Return by how much training moves the mean state of each answer on plain facts, [answer][hidden]."""
    rows = [encode_answer(given.tokenizer, chat_prompt(given.tokenizer, q), a) for q, a in neutral_texts()[:8]]
    layer = int(given.edits[0].layer)
    before = pool(given.model, rows, layer=layer).means[:, 0, 0]
    with tuned(given.model, training_rows(given.tokenizer, trained_on, max_length=256), seed=given.seed):
        return (pool(given.model, rows, layer=layer).means[:, 0, 0] - before).tolist()


def nearness(feature: Float[Tensor, "1 hidden"], moved: Float[Tensor, "answer hidden"], which: np.ndarray) -> float:
    """Return the cosine of a feature with the shift over some of the answers."""
    return float(feature_cosines(feature, moved[which].mean(dim=0)))


def effects(given: Given, directions: Float[Tensor, "row hidden"]) -> Any:
    """Return what directions, at the edit's length, add to the contrast of the statements that report, [row][pair]."""
    edit, asked = given.edits[0], load_statements(given.vectors[0].trait).split()[1].part(0, 3 * given.size)
    scaled = normalize(directions, dim=1) * edit.vector.direction(edit.layer).norm()
    made = [edit.vector._derived("feature", row.expand(edit.vector.directions.shape).clone()) for row in scaled]
    states = [State(), State(edit), *(State(edit._replace(vector=vector)) for vector in made)]
    read = likelihood_contrasts(given.model, given.tokenizer, asked, states)
    return (read[1:] - read[0]).tolist()


def lines(given: Given) -> list[Line]:
    """Return the shift's features, and what adding them does on 3 `size` statements, beside 10 `size` random ones."""
    edit, rows = given.edits[0], given.features
    if rows is None:
        rows = output_rows(given.model).cpu()
        rows = rows[: len(given.tokenizer)] - rows[: len(given.tokenizer)].mean(dim=0)
    rng = np.random.default_rng(given.seed)
    made = load_statements(edit.vector.trait).split()[0]
    data = {edit.vector.trait: [(q, pair.pos) for q, pair in zip(made.questions, made.pairs)]}
    data["plain facts"] = neutral_texts()[-len(made.pairs) :]
    moved = {name: torch.tensor(given.once(name, shift, given, texts)) for name, texts in data.items()}
    vector = edit.vector.direction(edit.layer)
    noise = torch.stack([each.vector.direction(edit.layer) for each in given.random_edits(edit, 100)])
    ranked, random = feature_cosines(rows, vector), feature_cosines(rows, noise)
    chance, result = upper(random.amax(dim=1), "random directions' largest"), []

    def named(feature: int) -> str:
        return f"feature {feature}" if given.features is not None else repr(given.tokenizer.decode([feature]))

    for name, each in moved.items():
        own = feature_cosines(rows, each.mean(dim=0))
        best = int(own.argmax())
        near = bootstrap(partial(nearness, rows[[best]], each), range(len(each)))
        result.append(Line(f"shift by {name}: cosine with {named(best)}, the first", near, *chance))
        null = upper([shared_features(own, row, TOP) for row in random], "random directions")
        common = over([shared_features(own, ranked, TOP)])
        result.append(Line(f"shift by {name}: share of the vector's first {TOP}", common, *null))
    whole = moved[edit.vector.trait].mean(dim=0, keepdim=True)
    first = feature_cosines(rows, whole[0]).topk(ADDED).indices.tolist()
    drawn = rng.choice(len(rows), 10 * given.size, replace=False)
    read = np.array(given.once("effects", effects, given, torch.cat([whole, rows[first], rows[drawn]])))
    names = [f"the {edit.vector.trait} vector", "the shift", *map(named, first)]
    most = float(read[len(names) :].mean(axis=1).max())
    of = f"largest of {len(drawn)} random features"
    return [*result, *(Line(f"effect of adding {name}", over(each), most, of) for name, each in zip(names, read))]
