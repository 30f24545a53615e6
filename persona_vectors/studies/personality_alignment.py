"""Personality alignment: a person's answers to an inventory brought about by shifts of attention heads.

Zhu et al. 2024 (arXiv 2408.11779), PAS. People are drawn: high or low in each of five factors, so that each IPIP item
has an answer, 5 or 1. "Yes" and "no" to 30 items are answers of this person or not; a ridge probe of each head at the
answer's end, held out by item, has an AUROC. The best tenth of the heads are shifted along the mean difference by
alpha deviations of the projections on it, as biases of the output projections. Alpha, or none, is what is best on 5
other items (in the original it is chosen on those that are reported). The distance, in points of 1 to 5, is that of
the model's expected answers from the person's on 15 further items. Beside it stand a layer's mean difference, steered
with where a layer's probe is best, by an alpha chosen alike; the person's answers in the prompt; and as the null the
heads, directions and alphas that the person's answers give when they are permuted over the 30 items.

The paper: shifts of heads come nearer to people's answers than prompts and training on their preferences do.

A small model can show whether heads that tell a person's answers also give them; it cannot show a personality, as its
answers to an inventory follow the options' letters as much as the item.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.evaluation.inventory import ipip_items, item_scores
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.steering.add import steer
from persona_vectors.steering.heads import head_states, shift_heads
from persona_vectors.studies.frame import Given, Line, over
from persona_vectors.vectors.probes import auroc, deviations, held_out
from persona_vectors.vectors.vector import PersonaVector

VECTORS, ALPHAS, RANDOM = 0, (2.0, 5.0, 10.0), 3
ITEMS = [item for i in range(10) for item in ipip_items()[i::10]]
PROBED, CHOOSING, MEASURED = ITEMS[:30], ITEMS[30:35], ITEMS[35:]
Person = dict[str, int]
"""1 or -1 in each factor."""


def answers(person: Person, items: Sequence[Any]) -> Float[Tensor, " item"]:
    """Return a person's answers to items, 5 or 1."""
    return torch.tensor([3.0 + 2 * person[factor] * key for _, factor, key in items])


def distance(given: Given, person: Person, items: Sequence[Any], system: str | None = None) -> float:
    """Return the mean distance of the model's expected answers from a person's."""
    found = item_scores(given.model, given.tokenizer, [item for item, *_ in items], system=system).mean(dim=1)
    return float((found - answers(person, items)).abs().mean())


def nearest(far: Callable[[Sequence[Any]], float], shift: Callable[[float], AbstractContextManager[None]]) -> float:
    """Return the distance on MEASURED at the alpha, or none, that is the nearest on CHOOSING."""

    def at(alpha: float, items: Sequence[Any]) -> float:
        with shift(alpha) if alpha else nullcontext():
            return far(items)

    return at(min((0.0, *ALPHAS), key=lambda alpha: at(alpha, CHOOSING)), MEASURED)


def read(given: Given) -> tuple[Any, ...]:
    """Return states of yes and no to each item, [row, layer, head, dim] and [row, layer, hidden], and their probes."""
    prompts = [chat_prompt(given.tokenizer, f'Is this accurate of you? "{item}"') for item, *_ in PROBED]
    rows = [encode_answer(given.tokenizer, prompt, reply) for prompt in prompts for reply in ("Yes.", "No.")]
    heads, layers = head_states(given.model, rows), pool(given.model, rows).means[:, 0]
    probes = [
        [held_out(each.double().numpy(), np.arange(len(rows)) // 2) for each in states.unbind(dim=1)]
        for states in (heads.flatten(1, 2), layers)
    ]
    return heads, layers, *probes


def measure(given: Given, known: Callable[[], Any], number: int) -> dict[str, Any]:
    """Return a person's distances: plain, prompted, at a layer, at heads, and at those of permuted answers."""
    rng, (heads, layers, by_head, by_layer) = np.random.default_rng([given.seed, number]), known()
    person = {factor: int(rng.choice([-1, 1])) for _, factor, _ in ITEMS[:5]}
    own, far = answers(person, PROBED) > 3, partial(distance, given, person)

    def aligned(yes: Tensor, states: Tensor, probes: Sequence[np.ndarray], shift: Callable[..., Any]) -> Any:
        agrees = torch.stack([yes, ~yes], dim=1).flatten()
        scores = torch.tensor([auroc(probe @ agrees.numpy(), agrees.numpy()) for probe in probes])
        best = scores.topk(max(1, len(scores) // 10)).indices
        return float(scores[best].mean()), nearest(far, partial(shift, deviations(states, agrees), best))

    def at_layer(directions: Tensor, best: Tensor, alpha: float) -> AbstractContextManager[None]:
        return steer(given.model, PersonaVector("person", "", directions), layer=int(best[0]), coef=alpha)

    def at_heads(directions: Tensor, best: Tensor, alpha: float) -> AbstractContextManager[None]:
        chosen = torch.zeros(len(by_head)).index_fill(0, best, alpha).view(*directions.shape[:2], 1)
        return shift_heads(given.model, directions * chosen)

    said = " ".join(item for (item, *_), yes in zip(PROBED, own) if yes)
    permuted = [own[torch.from_numpy(rng.permutation(len(own)))] for _ in range(RANDOM)]
    found = {"plain": far(MEASURED), "prompt": far(MEASURED, f"This is accurate of you: {said}")}
    found["auroc"], found["heads"] = aligned(own, heads, by_head, at_heads)
    found["layer"] = aligned(own, layers, by_layer, at_layer)[1]
    return found | {"permuted": [aligned(yes, heads, by_head, at_heads) for yes in permuted]}


def lines(given: Given) -> list[Line]:
    """Return how near `size` + 1 people come: by their answers in the prompt, a layer's vector, and shifts of heads."""
    known = cache(partial(read, given))
    found = [given.once(f"person {i}", measure, given, known, i) for i in range(given.size + 1)]
    plain, permuted = np.array([each["plain"] for each in found]), np.array([each["permuted"] for each in found])
    (tells, far), of = permuted.mean(axis=0).T, f"of {RANDOM} with permuted answers"
    tell, null = over(each["auroc"] for each in found), (float((far - plain.mean()).min()), f"nearest {of}")
    result = [Line("AUROC of the best tenth of the heads", tell, float(tells.max()), f"largest {of}")]
    result.append(Line("distance, plain", over(plain)))
    for name, way in (("their answers in the prompt", "prompt"), ("a layer's vector", "layer"), ("heads", "heads")):
        result.append(Line(f"distance with {name}, less plain", over([e[way] - e["plain"] for e in found]), *null))
    return result
