"""Embedding-to-Prefix and Persona-Plug: a person told to a frozen model in one soft token, beside the person in words.

Huber et al. 2025 (arXiv 2505.17051) map one embedding of a user to a soft token, Liu et al. 2024 (arXiv 2409.11901) a
sum of the user's history, each part weighted by its likeness to what is asked. People are drawn here: where they
live, what they do, eat and keep, one of six each. Their history is a statement of each; a statement's embedding is
its mean state at the middle layer, and likeness a softmax of ten times its cosine with the question's. One linear map
for each way is trained on some people's answers to the four questions; others, whom it did not see, are measured: by
how much likelier their own answers are than two with other values, in nats a token, as any soft token makes an answer
of this form likelier. The gain is over the plain model, and the share is of the gain that the history has as a system
prompt. The null is the same map with the history of other people.

The paper: one soft token from an embedding tells a model of its user at little cost, in dialogue and in search (the
first); a weighted history is better than retrieved texts in the prompt (the second).

A small model can show how much of four facts passes through one token, to people whose facts were seen apart; it
cannot show what a token holds of a person's years of history.
"""

from itertools import chain, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_vectors.data.intervals import bootstrap
from persona_vectors.model.blocks import model_shape
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.studies.frame import Given, Line, over, shipped
from persona_vectors.training.soft import fit_soft_token, soft_logprobs, weighted_history

VECTORS, SHUFFLES, OTHERS, EPOCHS = 0, 5, 2, 6
LIVES: list[list[str]] = shipped("lives")
"""A question, a statement, and the values that it is completed with."""


def share(gains: np.ndarray, whole: np.ndarray) -> float:
    """Return people's mean gain as a share of that of the prompt, [person] each."""
    return float(gains.mean() / whole.mean())


def measure(given: Given) -> dict[str, Any]:
    """Return held-out people's mean preference for their answers: plain, prompted, and by each map and history."""
    model, tokenizer, rng = given.model, given.tokenizer, np.random.default_rng(given.seed)
    asked, said = [q for q, *_ in LIVES], [[text.format(value) for value in values] for _, text, *values in LIVES]
    prompt = chat_prompt(tokenizer, "Tell me about yourself.")
    texts = [encode_answer(tokenizer, prompt, text) for text in [*asked, *chain(*said)]]
    states = pool(model, texts, layer=model_shape(model)[0] // 2).means[:, 0, 0].clone()
    questions, facts = states[: len(asked)], states[len(asked) :].view(len(asked), len(said[0]), -1)
    questions, facts = questions - questions.mean(dim=0), facts - facts.mean(dim=(0, 1))
    every = rng.permutation(len(said[0]) ** len(asked))[: 18 * given.size + 2]
    people = np.stack(np.unravel_index(every, [len(said[0])] * len(asked)), axis=1)
    known, new = np.split(people, [16 * given.size])

    def rows(of: np.ndarray, others: int = 0, told: bool = False) -> list:
        made = []
        for person, i, other in product(of, range(len(asked)), range(others + 1)):
            system = " ".join(each[value] for each, value in zip(said, person)) if told else None
            text = said[i][(person[i] + other) % len(said[i])]
            made.append(encode_answer(tokenizer, chat_prompt(tokenizer, asked[i], system=system), text))
        return made

    def vectors(of: np.ndarray, evenly: bool) -> Tensor:
        histories = [facts[torch.arange(len(asked)), torch.from_numpy(person)] for person in of]
        return torch.stack([weighted_history(question, each, evenly) for each in histories for question in questions])

    def read(of: list, soft: Tensor | None = None) -> list[float]:
        parts = (slice(i, i + 16) for i in range(0, len(of), 16))
        found = [soft_logprobs(model, of[part], None if soft is None else soft[part]) for part in parts]
        own = torch.cat(found).view(len(new), len(asked), -1)
        return (own[..., 0] - own[..., 1:].mean(dim=2)).mean(dim=1).tolist()

    own = rows(new, OTHERS)
    others = [new[(np.arange(len(new)) + shift) % len(new)] for shift in range(1, SHUFFLES + 1)]
    with torch.no_grad():
        result: dict[str, Any] = {"plain": read(own), "prompt": read(rows(new, OTHERS, told=True))}
    for way, evenly in (("one embedding", True), ("a weighted history", False)):
        made = fit_soft_token(model, rows(known), vectors(known, evenly), epochs=EPOCHS, seed=given.seed)
        with torch.no_grad():
            told = [vectors(of, evenly).repeat_interleave(OTHERS + 1, dim=0) for of in (new, *others)]
            result[way] = [read(own, made(each)) for each in told]
    return result


def lines(given: Given) -> list[Line]:
    """Return the shares of the prompt's gain, of 2 `size` + 2 people, by maps trained on 16 `size` others."""
    found = {name: np.array(value) for name, value in given.once("people", measure, given).items()}
    whole = found["prompt"] - found["plain"]
    result = [Line("gain of the history as a system prompt", over(whole))]
    for way in ("one embedding", "a weighted history"):
        own, *others = found[way] - found["plain"]
        kept = bootstrap(lambda i: share(own[i], whole[i]), range(len(own)))  # noqa: B023
        most = max(share(each, whole) for each in others)
        result.append(Line(f"share of it by {way}", kept, most, f"largest of {SHUFFLES} with other people's history"))
        result.append(Line(f"gain by {way}, less other people's history", over(own - np.mean(others, axis=0))))
    return result
