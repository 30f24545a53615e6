"""The model as a policy: the next token's probabilities after each prefix of an answer."""

from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from persona_vectors.evaluation.logprobs import next_token_logprobs
from persona_vectors.model.blocks import Model
from persona_vectors.model.prompts import chat_prompt, encode
from persona_vectors.steering.add import RowEdit

Tokens = tuple[int, ...]
Policy = Callable[[Sequence[Tokens]], list[np.ndarray]]
"""Gives the next token's probabilities, [vocab], after each of some prefixes of an answer."""


def policy(model: Model, tokenizer: PreTrainedTokenizerBase, question: str, edit: RowEdit | None) -> Policy:
    """Return the model under an edit as a policy of answers to a question; each prefix is read once."""
    prompt = encode(tokenizer, chat_prompt(tokenizer, question))
    known: dict[Tokens, np.ndarray] = {}

    def after(prefixes: Sequence[Tokens]) -> list[np.ndarray]:
        new = list(dict.fromkeys(prefix for prefix in prefixes if prefix not in known))
        rows = [(prompt, prefix) for prefix in new]
        for prefix, logprobs in zip(new, next_token_logprobs(model, rows, edits=[edit] * len(rows))):
            known[prefix] = logprobs.exp().numpy()
        return [known[prefix] for prefix in prefixes]

    return after


def answers(policy: Policy, count: int, length: int, rng: np.random.Generator) -> list[Tokens]:
    """Return the first `length` tokens of `count` answers, drawn from a policy."""
    found: list[Tokens] = [()] * count
    for _ in range(length):
        found = [(*tokens, draw(after, rng)) for tokens, after in zip(found, policy(found))]
    return found


def draws(chances: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """Return `count` draws of a distribution that may be unnormalised, [draw]."""
    total = np.cumsum(chances, dtype=np.float64)
    return np.searchsorted(total, rng.random(count) * total[-1], side="right")


def draw(chances: np.ndarray, rng: np.random.Generator) -> int:
    """Return one draw of a distribution that may be unnormalised."""
    return int(draws(chances, rng, 1)[0])


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Return half the sum of absolute differences of two distributions."""
    return float(np.abs(np.asarray(p, dtype=np.float64) - q).sum() / 2)


def frequencies(draws: np.ndarray, size: int) -> np.ndarray:
    """Return how often each of `size` values was drawn, as shares."""
    return np.bincount(draws, minlength=size) / len(draws)
