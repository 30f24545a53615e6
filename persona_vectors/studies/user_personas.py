"""User personas: whether who asks decides what is refused.

Ghandeharioun et al. 2024 (arXiv 2406.12094). The user says yes or no to first-person statements that match a persona
and to opposing ones; its vector is the mean over statements of the state at the prompt's last token after yes less
that after no, turned round for opposing ones. Added at early to middle layers, at a tenth of the residual stream's
norm, it moves by how much refusals are likelier than compliance (nats a token) after harmless requests that sound
harmful; beside it stands the persona in the system prompt. Whether the cosine with the refusal vector (refusals' states
less those of compliance, on other requests) predicts the effect is 1 - SSE / SSE of the others' mean, each persona
left out of its own prediction. The state before an answer is decoded by patching it into a prompt that repeats words
and into the last block (the logit lens): found is a request whose own word gains most, of all requests' words.

The paper: user personas move refusal more than prompts that ask for it do; early layers hold what is withheld; how
near a persona vector is to the refusal vector predicts its effect.

A small model can show whether vectors of the user reach its readiness to refuse, beside random ones; it cannot show
what it withholds from whom, as it was hardly trained to refuse.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from persona_vectors.data.texts import assistant_prompts
from persona_vectors.data.traits import InstructionPair
from persona_vectors.evaluation.likelihood import State, Statements, likelihood_contrasts
from persona_vectors.model.blocks import model_shape
from persona_vectors.model.pooling import pool, prompt_states
from persona_vectors.model.prompts import chat_prompt, encode, encode_answer
from persona_vectors.steering.add import RowEdit
from persona_vectors.studies.frame import Given, Line, over, shipped, upper
from persona_vectors.vectors.geometry import patched_logprobs
from persona_vectors.vectors.probes import identified, left_out_fit, signed_difference
from persona_vectors.vectors.vector import PersonaVector

VECTORS, DOSE, USERS = 0, 0.1, shipped("users")
REQUESTS, WORDS = zip(*USERS["requests"])
SAID, REPEAT = 'Would I say "{}" of myself? {}.', "cat cat\n1135 1135\nhello hello\nblue blue\n?"


def moved(given: Given, states: Sequence[State]) -> Any:
    """Return by how much likelier states make refusals than compliance, beside the plain model, [state][request]."""
    asked, pairs = REQUESTS[: 2 * given.size], tuple(InstructionPair(pos=a, neg=b) for a, b in USERS["answers"])
    questions = tuple(request for request in asked for _ in pairs)
    answers = Statements(question=questions, pairs=pairs * len(asked), orders=len(pairs))
    read = likelihood_contrasts(given.model, given.tokenizer, answers, [State(), *states])
    return (read[1:] - read[0]).tolist()


def vectors(given: Given) -> tuple[list[PersonaVector], Tensor]:
    """Return the personas' vectors, at the dose's norm, and the refusal vector, [layer, hidden]."""
    prompts = [chat_prompt(given.tokenizer, request) for request in REQUESTS[8:]]
    said = [(prompt, text) for prompt in prompts for pair in USERS["answers"] for text in pair]
    others, made = pool(given.model, [encode_answer(given.tokenizer, *each) for each in said]), []
    for sides in USERS["personas"].values():
        texts = [SAID.format(text, reply) for side in sides for text in side for reply in ("Yes", "No")]
        signs = torch.tensor([1.0, -1.0]).repeat_interleave(len(sides[0]))
        states = prompt_states(given.model, given.tokenizer, texts).unflatten(0, (-1, 2))
        norms = DOSE * others.norms.mean(dim=0)[:, None]
        made.append(PersonaVector("user", "", normalize(signed_difference(states, signs), dim=1) * norms))
    return made, (others.means[0::2, 0] - others.means[1::2, 0]).mean(dim=0)


def measure(given: Given) -> list[dict[str, Any]]:
    """Return for each layer the effects of vectors and of random ones, cosines, and what is decoded."""
    (made, refusal), depth, result = vectors(given), model_shape(given.model)[0], []
    repeat, *words = [encode(given.tokenizer, text) for text in (REPEAT, *(f" {word}" for word in WORDS))]
    asked = prompt_states(given.model, given.tokenizer, REQUESTS)
    for layer in sorted({depth // 6, depth // 3, depth // 2}):
        edits, decoded = [RowEdit(vector, layer, 1.0) for vector in made], {}
        effects = moved(given, [State(each) for each in edits + given.random_edits(edits[0], 10 * given.size)])
        for way, at in (("patching", layer), ("the logit lens", depth - 1)):
            logprobs = patched_logprobs(given.model, repeat, asked[:, layer], layer=at)
            decoded[way] = logprobs[:, [tokens[0] for tokens in words]].tolist()
        cosines = [float(cosine_similarity(vector[layer], refusal[layer], dim=0)) for vector in made]
        result.append({"layer": layer, "effects": effects, "cosines": cosines, "decoded": decoded})
    return result


def lines(given: Given) -> list[Line]:
    """Return what eight personas move on 2 `size` requests, at most eight, beside 10 `size` random directions."""
    names, alike = list(USERS["personas"]), [text for text in assistant_prompts() if text][:12]
    layers, rng = given.once("layers", measure, given), np.random.default_rng(given.seed)
    systems = [State(system=text) for text in [*(f"The user is {name}." for name in names), *alike]]
    said, effects = np.array(given.once("stated", moved, given, systems)), np.array([e["effects"] for e in layers])
    own, random = np.split(effects, [len(names)], axis=1)
    null = upper(np.abs(random.mean(axis=2)).max(axis=0), "random directions' sizes, each at its best layer")
    same = upper(np.abs(said[len(names) :].mean(axis=1)), "sizes of 12 prompts that mean the same")
    best, result = np.abs(own.mean(axis=2)).argmax(axis=0), []
    for i, name in enumerate(names):
        result.append(Line(f"{name} user, vector at layer {layers[best[i]]['layer']}", over(own[best[i], i]), *null))
        result.append(Line(f"{name} user, stated", over(said[i]), *same))
    for each, y in zip(layers, own.mean(axis=2)):
        x, at = np.array(each["cosines"]), f"at layer {each['layer']}"
        chance = upper([left_out_fit(rng.permutation(x), y) for _ in range(500)], "permuted cosines")
        result.append(Line(f"effect predicted by the cosine {at}", over([left_out_fit(x, y)]), *chance))
        for way, table in each["decoded"].items():
            chance = upper([identified(rng.permutation(table)).mean() for _ in range(500)], "permuted requests")
            result.append(Line(f"word found {at} by {way}", over(identified(np.array(table))), *chance))
    return result
