"""Multi-personality generation: several personalities in one distribution, sampled by accepted chunks.

Chen et al. 2025 (arXiv 2511.01891). The target is reference(y) * product of (part_i(y) / reference(y)) ** a_i, over
one for all chunks that may follow; the parts are the model under one vector each, and a_i is 1. A chunk is drawn
from the plain model and accepted with probability w / M, w being its ratio and M the largest of a window of 64 drawn
chunks. With M the largest of all chunks that is exact; with a window's it is nearly so, and the first line says how
nearly, for chunks of one token, whose target is known. The effects are differences from the plain model of the
statements' likelihood contrast, in nats a token, under the target token by token.

The paper: answers with several personality traits or roles at once, up to 16 to 18 % better than other ways of
combining them, with less overhead than rejecting whole answers.

A small model can show whether the sampler has the distribution that it names, and whether both traits rise in it; it
cannot show whether the answers read as one person.
"""

from typing import Any

import numpy as np
import torch

from persona_vectors.data.traits import load_trait
from persona_vectors.evaluation.contrast import by_pair
from persona_vectors.evaluation.likelihood import Statements, load_statements
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.evaluation.policies import (
    acceptance,
    accepted,
    combined,
    combined_contrasts,
    draws,
    frequencies,
    policy,
    total_variation,
)
from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.prompts import chat_prompt, encode
from persona_vectors.studies.frame import Given, Line, over

VECTORS, WINDOW = 2, 64


def distances(given: Given, question: str) -> dict[str, Any]:
    """Return how far accepted tokens are from the exact target, how far the target's own draws, and the acceptance."""
    rng = np.random.default_rng([given.seed, *question.encode()])
    (reference, *parts) = (
        policy(given.model, given.tokenizer, question, edit)([()])[0] for edit in (None, *given.edits[:2])
    )
    logs = [torch.as_tensor(each).double().clamp(min=1e-38).log() for each in (reference, *parts)]
    target = combined(logs[0], logs[1:], [1, 1]).exp().numpy()
    ratios = (logs[1] + logs[2] - 2 * logs[0]).numpy()
    windows = [draws(reference, rng, WINDOW) for _ in range(100 * given.size)]
    chosen = np.array([window[accepted(ratios[window], rng)] for window in windows])
    own = [total_variation(frequencies(draws(target, rng, len(chosen)), len(target)), target) for _ in range(200)]
    found: dict[str, Any] = {"tv": total_variation(frequencies(chosen, len(target)), target), "own": own}
    found["one"] = float(np.mean([acceptance(ratios[window]) for window in windows]))
    prompt = encode(given.tokenizer, chat_prompt(given.tokenizer, question))
    drawn = generate_tokens(given.model, given.tokenizer, [prompt] * WINDOW, max_new_tokens=4, seed=given.seed)
    rows = [(prompt, tokens) for tokens, ended in drawn if tokens and not ended]
    states = [None, *given.edits[:2]]
    read = answer_logprobs(given.model, rows * 3, edits=[edit for edit in states for _ in rows]).view(3, -1) * 4
    return found | {"four": acceptance((read[1] + read[2] - 2 * read[0]).numpy())}


def lines(given: Given) -> list[Line]:
    """Return how exact the sampler is, what it accepts, and what the target does to both traits' contrasts.

    There are `size` + 2 questions, with 100 `size` windows each, and `size` + 2 pairs of statements for a trait.
    """
    questions = load_trait("optimistic").questions.eval[: given.size + 2]
    found = [given.once(question, distances, given, question) for question in questions]
    own = float(np.quantile(np.mean([each["own"] for each in found], axis=0), 0.975))
    exact, least = "97.5th percentile of exact draws", "the least that a window can have"
    result = [
        Line("TV of accepted tokens to the exact target", over(each["tv"] for each in found), own, exact),
        Line("acceptance, chunks of one token", over(each["one"] for each in found), 1 / WINDOW, least),
        Line("acceptance, chunks of four tokens", over(each["four"] for each in found), 1 / WINDOW, least),
    ]
    noise = [edit for own in given.edits[:2] for edit in given.random_edits(own, 6)]
    pairs = [(), (0,), (1,), (0, 1), *((2 + i, 8 + i) for i in range(6))]

    def contrasts(statements: Statements) -> Any:
        edits = [*given.edits[:2], *noise]
        return combined_contrasts(given.model, given.tokenizer, statements, edits, pairs).tolist()

    for vector in given.vectors[:2]:
        statements = load_statements(vector.trait).split()[1].part(0, given.size + 2)
        read = given.once(vector.trait, contrasts, statements)
        effects = torch.tensor(read[1:]) - torch.tensor(read[0])
        null = float(effects[3:].mean(dim=1).max())
        for name, effect in zip((*(f"{v.trait} alone" for v in given.vectors[:2]), "both"), effects):
            what = f"effect on {vector.trait} statements of {name}"
            result.append(Line(what, by_pair(effect), null, "largest of 6 targets of two random vectors"))
    return result
