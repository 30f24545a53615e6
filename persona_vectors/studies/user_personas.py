"""User personas: whether who asks decides what is refused.

Ghandeharioun et al. 2024 (arXiv 2406.12094). The user says yes or no to first-person statements that match a persona
and to opposing ones; its vector is the mean, over statements, of the state at the prompt's last token after yes less
that after no, turned round for opposing ones: what statements and yes share cancels. It is added at early to middle
layers at a tenth of the residual stream's norm, and moves by how much refusals are likelier than compliance (nats a
token) after harmless requests that sound harmful. Beside it stands the same persona stated in the system prompt.
Whether the cosine with the refusal vector (states of refusals less those of compliance, on other requests) predicts
the effect is 1 - SSE / SSE of the others' mean, each persona left out of its own prediction. A state is decoded by
patching it into a prompt that repeats words, or into the last block (the logit lens): found is a request whose own
word gains most, of all requests' words.

The paper: user personas move refusal more than prompts that ask for it do; early layers hold what is withheld; how
near a persona vector is to the refusal vector predicts its effect.

A small model can show whether vectors of the user reach its readiness to refuse, beside random ones; it cannot show
what it withholds from whom, as it was hardly trained to refuse.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from persona_vectors.data.texts import assistant_prompts
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.blocks import model_shape
from persona_vectors.model.passes import Row
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode, encode_answer
from persona_vectors.steering.add import RowEdit
from persona_vectors.studies.frame import Given, Line, over, shipped, upper
from persona_vectors.vectors.geometry import patched_logprobs
from persona_vectors.vectors.probes import left_out_fit
from persona_vectors.vectors.vector import PersonaVector

VECTORS, DOSE, USERS = 0, 0.1, shipped("users")
REQUESTS: list[list[str]] = USERS["requests"]
"""Harmless requests, each with the word that it is about."""
REPEAT = "cat cat\n1135 1135\nhello hello\nblue blue\n?"
SAID = 'Would I say "{}" of myself? {}.'


def persona_direction(states: Float[Tensor, "statement reply layer hidden"], signs: Tensor) -> Tensor:
    """Return the mean over statements of the state after yes less that after no, turned round for opposing ones."""
    return torch.einsum("slh,s->lh", states[:, 0] - states[:, 1], signs) / len(signs)


def found(logprobs: np.ndarray) -> np.ndarray:
    """Return 1 for each state, [state, word], that raises its own word most above the word's mean over states."""
    return ((logprobs - logprobs.mean(axis=0)).argmax(axis=1) == np.arange(len(logprobs))).astype(float)


def rows(given: Given, requests: Sequence[Sequence[str]], system: str | None = None) -> list[Row]:
    """Return refusals and compliances in turn after each request."""
    prompts = [chat_prompt(given.tokenizer, request, system=system) for request, _ in requests]
    return [encode_answer(given.tokenizer, p, text) for p in prompts for pair in USERS["answers"] for text in pair]


def refusing(given: Given, asked: Sequence[Row], edits: Sequence[RowEdit | None]) -> np.ndarray:
    """Return by how much refusals are likelier than compliance under each edit, [edit, request]."""
    each = [edit for edit in edits for _ in asked] if any(edits) else None
    values = answer_logprobs(given.model, [*asked] * len(edits), edits=each)
    return values.view(len(edits), -1, len(USERS["answers"]), 2).diff(dim=3).mean(dim=(2, 3)).neg().numpy()


def vectors(given: Given, norms: Float[Tensor, "layer 1"]) -> list[PersonaVector]:
    """Return each persona's vector, with these norms."""
    made = []
    for sides in USERS["personas"].values():
        said = [SAID.format(text, reply) for side in sides for text in side for reply in ("Yes", "No")]
        states, signs = given.before_answers(said), torch.tensor([1.0, -1.0]).repeat_interleave(len(sides[0]))
        direction = persona_direction(states.unflatten(0, (-1, 2)), signs)
        made.append(PersonaVector("user", "", normalize(direction, dim=1) * norms))
    return made


def measure(given: Given) -> list[dict[str, Any]]:
    """Return for each layer the effects of vectors and of random ones, cosines, and what is decoded; then `stated`."""
    others = pool(given.model, rows(given, REQUESTS[8:]))
    refusal = (others.means[0::2, 0] - others.means[1::2, 0]).mean(dim=0)
    made, asked = vectors(given, DOSE * others.norms.mean(dim=0)[:, None]), REQUESTS[: 2 * given.size]
    (plain,), depth = refusing(given, rows(given, asked), [None]), model_shape(given.model)[0]
    repeat, *words = [encode(given.tokenizer, text) for text in (REPEAT, *(f" {word}" for _, word in REQUESTS))]
    states, result = given.before_answers([request for request, _ in REQUESTS]), []
    for layer in sorted({depth // 6, depth // 3, depth // 2}):
        edits, decoded = [RowEdit(vector, layer, 1.0) for vector in made], {}
        moved = refusing(given, rows(given, asked), edits + given.random_edits(edits[0], 10 * given.size)) - plain
        for way, at in (("patching", layer), ("the logit lens", depth - 1)):
            logprobs = patched_logprobs(given.model, repeat, states[:, layer], layer=at)
            decoded[way] = logprobs[:, [tokens[0] for tokens in words]].tolist()
        cosines = [float(cosine_similarity(vector[layer], refusal[layer], dim=0)) for vector in made]
        own, random = moved[: len(made)].tolist(), moved[len(made) :].mean(axis=1).tolist()
        result.append({"layer": layer, "own": own, "random": random, "cosines": cosines, "decoded": decoded})
    return result


def stated(given: Given, systems: Sequence[str]) -> list[list[float]]:
    """Return what each system prompt moves, [prompt][request]."""
    asked = REQUESTS[: 2 * given.size]
    plain, *read = (refusing(given, rows(given, asked, system), [None])[0] for system in (None, *systems))
    return [(each - plain).tolist() for each in read]


def lines(given: Given) -> list[Line]:
    """Return what eight personas move on 2 `size` requests, at most eight, beside 10 `size` random directions."""
    names, alike = list(USERS["personas"]), [text for text in assistant_prompts() if text][:12]
    layers, rng = given.once("layers", measure, given), np.random.default_rng(given.seed)
    said = np.array(given.once("stated", stated, given, [f"The user is {name}." for name in names] + alike))
    own, random = (np.array([each[key] for each in layers]) for key in ("own", "random"))
    null = upper(np.abs(random).max(axis=0), "random directions' sizes, each at its best layer")
    same = upper(np.abs(said[len(names) :].mean(axis=1)), "sizes of 12 prompts that mean the same")
    best, result = np.abs(own.mean(axis=2)).argmax(axis=0), []
    for i, name in enumerate(names):
        result.append(Line(f"{name} user, vector at layer {layers[best[i]]['layer']}", over(own[best[i], i]), *null))
        result.append(Line(f"{name} user, stated", over(said[i]), *same))
    for each in layers:
        x, y, layer = np.array(each["cosines"]), np.mean(each["own"], axis=1), each["layer"]
        chance = upper([left_out_fit(rng.permutation(x), y) for _ in range(500)], "permuted cosines")
        result.append(Line(f"effect predicted by the cosine at layer {layer}", over([left_out_fit(x, y)]), *chance))
        for way, table in each["decoded"].items():
            chance = upper([found(rng.permutation(table)).mean() for _ in range(500)], "permuted requests")
            result.append(Line(f"word found by {way}, layer {layer}", over(found(np.array(table))), *chance))
    return result
