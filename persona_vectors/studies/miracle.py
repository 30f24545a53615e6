"""MIRACLE: two attributes at once, by gradient steps down the energies of probes, beside added vectors.

Lu et al. 2023 (arXiv 2310.18342). A logistic probe of each of the first two vectors' traits is fitted to the states
of statements at the first one's layer; its energy is -log p of the trait, over its weights' norm. Every token takes
five gradient steps, h <- h + s * sum of (1 - p_i) w_i / |w_i|, none of them longer than s an attribute: states that
show a trait already are left alone. The added vectors are both traits', at unit length. Each has the strength at
which the 95th percentile of the KL from the plain model on two plain facts is 1 nat. Jointly right is a choice by
likelihood among four texts, a statement or its opposite of one trait followed by one of the other: the text that
shows both. The margin is the mean log-probability of that less the best other's. The null are probes of random
directions with the covariance of the states, and the same norms.

The paper: several attributes of a person at once in dialogue, better than earlier ways of control.

A small model can show whether probes move it towards both traits further than vectors at equal cost; it cannot show
whether what it then writes has them.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from persona_vectors.data.texts import neutral_texts
from persona_vectors.evaluation.cost import kl_cost, strength_at
from persona_vectors.evaluation.likelihood import load_statements
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.studies.frame import Given, Line, over
from persona_vectors.vectors.probes import logistic

VECTORS, STEPS = 2, 5


def descend(weights: Tensor, biases: Tensor, hidden: Tensor, step: float) -> Tensor:
    """Return states [..., hidden] after the gradient steps down the energies of probes, p = sigmoid(w h + b)."""
    weights, biases = weights.to(hidden), biases.to(hidden)
    for _ in range(STEPS):
        hidden = hidden + step * torch.sigmoid(-(hidden @ weights.T + biases)) @ normalize(weights)
    return hidden


def margins(given: Given, texts: list[str], move: Any) -> list[float]:
    """Return by how much the first of every four texts is the likeliest, with states as they are or as `move` says."""
    prompt, layer = chat_prompt(given.tokenizer, "What do you say about it?"), int(given.edits[0].layer)

    def edit(step: float) -> Any:
        return edit_blocks(given.model, {layer: lambda hidden, _: move(hidden, step)} if move else {})

    cost = kl_cost(given.model, given.tokenizer, edit, texts=neutral_texts()[:2])
    with edit(strength_at(cost, 1.0, of="this edit", tolerance=0.05) if move else 0.0):
        found = answer_logprobs(given.model, [encode_answer(given.tokenizer, prompt, text) for text in texts])
    return (found[0::4] - found.view(-1, 4)[:, 1:].amax(dim=1)).tolist()


def lines(given: Given) -> list[Line]:
    """Return how often the text with both traits is the likeliest, and by how much; of 4 `size` texts, at most 16."""
    vectors, layer, rows = given.vectors[:2], given.edits[0].layer, []
    made, asked = zip(*(load_statements(vector.trait).split() for vector in vectors))
    for each in made:
        prompt = chat_prompt(given.tokenizer, each.questions[0])
        rows += [encode_answer(given.tokenizer, prompt, text) for pair in each.pairs for text in (pair.pos, pair.neg)]
    states = pool(given.model, rows, layer=layer).means[:, 0, 0].double()
    probes = [logistic(half.numpy(), np.tile([1, 0], len(half) // 2)) for half in states.chunk(2)]
    weights, biases = torch.tensor(np.array([w for w, _ in probes])), torch.tensor([bias for _, bias in probes])
    mean, added = states.mean(dim=0), normalize(torch.stack([v.direction(layer) for v in vectors])).sum(dim=0)
    moves: dict[str, Any] = {"plain": None, "vectors": lambda hidden, step: hidden + step * added.to(hidden)}
    moves["probes"] = partial(descend, weights, biases)
    for i in range(4):
        drawn = torch.from_numpy(np.random.default_rng(given.seed + i).normal(size=(2, len(states)))) @ (states - mean)
        drawn = normalize(drawn) * weights.norm(dim=1, keepdim=True)
        moves[f"random probes {i}"] = partial(descend, drawn, -drawn @ mean)
    pairs = list(zip(*(each.pairs for each in asked)))[: 4 * given.size]
    texts = [f"{one} {two}" for a, b in pairs for one in (a.pos, a.neg) for two in (b.pos, b.neg)]
    found = {name: np.array(given.once(name, margins, given, texts, move)) for name, move in moves.items()}
    result = []
    for what, values in (("jointly right", {n: (m > 0) * 1.0 for n, m in found.items()}), ("margin", found)):
        most = max(float(each.mean()) for each in list(values.values())[3:])
        result += [Line(f"{what}, {name}", over(values[name])) for name in ("plain", "vectors")]
        result.append(Line(f"{what}, probes", over(values["probes"]), most, "largest of 4 pairs of random probes"))
    return [*result, Line("margin, probes less vectors", over(found["probes"] - found["vectors"]))]
