"""Personality alignment: a person's answers to an inventory brought about by shifts of attention heads.

Zhu et al. 2024 (arXiv 2408.11779), PAS. People are drawn: high or low in each of five factors, so that each IPIP item
has an answer of 5 or 1. On 30 items, "yes" and "no" are answers of this person or not; a ridge probe of each head at
the answer's end, held out by item, is measured by its AUROC. The tenth of the heads that do best are shifted by alpha
times the mean difference's direction and the deviation of projections on it, as biases of the output projections
(which the tests hold equal to a hook within 1e-5). Alpha is the best on 5 other items (in the original it is chosen
on those that are reported), or 0; the distance, of 1 to 5, is between the model's expected answers and the person's
on 15 further ones. Beside it are the layer-wise difference of means, steered with at the layer whose probe does best
with alpha chosen alike, the person's answers in the prompt, and random directions in random heads.

The paper: shifts of heads come nearer to 300 people's answers than prompts and training by preferences do.

A small model can show whether heads that tell a person's answers also give them; it cannot show a personality, as its
answers to an inventory follow the options' letters as much as the item.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_vectors.data.texts import DATA
from persona_vectors.evaluation.inventory import item_scores
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.steering.add import steer
from persona_vectors.steering.heads import head_states, shift_heads
from persona_vectors.studies.frame import Given, Line, over
from persona_vectors.vectors.probes import auroc, held_out
from persona_vectors.vectors.vector import PersonaVector

VECTORS, ALPHAS = 0, (2.0, 5.0, 10.0)
FACTORS = list(json.loads((DATA / "ipip50.json").read_text(encoding="utf-8"))["factors"].values())
ITEMS = [
    (entry["item"], factor, entry["key"]) for i in range(10) for factor in range(5) for entry in [FACTORS[factor][i]]
]
PROBED, CHOOSING, MEASURED = ITEMS[:30], ITEMS[30:35], ITEMS[35:]
Shift = Callable[[float], AbstractContextManager[None]]


def scaled_directions(states: Float[Tensor, "row *unit dim"], agrees: Bool[Tensor, " row"]) -> Tensor:
    """Return the direction from other answers to a person's, as long as the deviation of projections on it."""
    unit = torch.nn.functional.normalize(states[agrees].mean(dim=0) - states[~agrees].mean(dim=0), dim=-1)
    return unit * (states * unit).sum(dim=-1).std(dim=0)[..., None]


def answers(person: Sequence[int], items: Sequence[Any]) -> Tensor:
    """Return what a person, 1 or -1 in each factor, answers to items: 5 or 1."""
    return torch.tensor([3.0 + 2 * person[factor] * key for _, factor, key in items])


def distance(given: Given, person: Sequence[int], items: Sequence[Any], system: str | None = None) -> float:
    """Return the mean distance of the model's expected answers from a person's."""
    found = item_scores(given.model, given.tokenizer, [item for item, *_ in items], system=system).mean(dim=1)
    return float((found - answers(person, items)).abs().mean())


def aligned(far: Callable[[Sequence[Any]], float], shift: Shift) -> float:
    """Return the distance on MEASURED at the alpha, or none, that is nearest on CHOOSING."""
    found = {}
    for alpha in (0.0, *ALPHAS):
        with shift(alpha) if alpha else nullcontext():
            found[alpha] = far(CHOOSING)
    alpha = min(found, key=lambda each: found[each])
    with shift(alpha) if alpha else nullcontext():
        return far(MEASURED)


def read(given: Given) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return states of yes and no to the items probed, of heads and layers [row, ...], and the probes of all these."""
    prompts = [chat_prompt(given.tokenizer, f'Is this accurate of you? "{item}"') for item, *_ in PROBED]
    rows = [encode_answer(given.tokenizer, prompt, reply) for prompt in prompts for reply in ("Yes.", "No.")]
    heads, layers = head_states(given.model, rows), pool(given.model, rows).means[:, 0]
    units = [*heads.flatten(1, 2).unbind(dim=1), *layers.unbind(dim=1)]
    items = np.repeat(np.arange(len(PROBED)), 2)
    return heads, layers, np.stack([held_out(unit.double().numpy(), items) for unit in units])


def measure(given: Given, known: Callable[[], Any], number: int) -> dict[str, Any]:
    """Return a person's distances: plain, prompted, at a layer, at heads, and at random ones."""
    rng = np.random.default_rng([given.seed, number])
    person = rng.choice([-1, 1], 5).tolist()
    heads, layers, probes = known()
    agrees = (answers(person, PROBED) > 3).repeat_interleave(2) == torch.tensor([True, False] * len(PROBED))
    scores = torch.tensor([auroc(probe @ agrees.numpy(), agrees.numpy()) for probe in probes])
    shifts, count = scaled_directions(heads, agrees), heads[0, ..., 0].numel()
    best, layer = scores[:count].topk(max(1, count // 10)).indices, int(scores[count:].argmax())
    vector = PersonaVector("person", "", scaled_directions(layers, agrees))

    def only(directions: Tensor, which: Any) -> Shift:
        kept = torch.zeros(count, 1).index_fill(0, torch.as_tensor(which), 1.0).view(*heads.shape[1:3], 1)
        return lambda alpha: shift_heads(given.model, alpha * directions * kept)

    noise = [torch.as_tensor(rng.permutation(len(agrees))) for _ in range(3)]
    randoms = [
        only(scaled_directions(heads, agrees[order]), rng.choice(count, len(best), replace=False)) for order in noise
    ]
    far = partial(distance, given, person)
    said = " ".join(item for (item, *_), answer in zip(PROBED, answers(person, PROBED)) if answer > 3)
    return {
        "plain": far(MEASURED),
        "prompt": far(MEASURED, f"You are a person of whom this is accurate: {said}"),
        "layer": aligned(far, lambda alpha: steer(given.model, vector, layer=layer, coef=alpha)),
        "heads": aligned(far, only(shifts, best)),
        "random": [aligned(far, each) for each in randoms],
        "probe": float(scores[best].mean()),
    }


def lines(given: Given) -> list[Line]:
    """Return how near `size` people come, with their answers in a prompt, a layer's vector, and shifts of heads."""
    known = cache(partial(read, given))
    found = [given.once(f"person {i}", measure, given, known, i) for i in range(given.size)]
    random = float(np.mean([np.subtract(each["random"], each["plain"]) for each in found], axis=0).min())
    result = [
        Line("AUROC of the heads' probes, held out by item", over(each["probe"] for each in found), 0.5, "chance")
    ]
    result.append(Line("distance, plain", over(each["plain"] for each in found)))
    for name, way in (("answers in the prompt", "prompt"), ("vector at one layer", "layer"), ("heads", "heads")):
        moved = over(each[way] - each["plain"] for each in found)
        result.append(Line(f"{name}, less plain", moved, random, "nearest of 3 sets of random heads and directions"))
    return result
