"""The model as a policy, the next token's probabilities after each prefix of an answer, and samplers of several."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.evaluation.cost import next_logprobs
from persona_vectors.evaluation.likelihood import Statements
from persona_vectors.evaluation.logprobs import next_token_logprobs
from persona_vectors.model.blocks import Model
from persona_vectors.model.prompts import chat_prompt, encode, encode_answer
from persona_vectors.steering.add import RowEdit, steer_rows

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


def overlap(draft: np.ndarray, judge: np.ndarray) -> float:
    """Return 1 - TV of two distributions: the probability that a token drafted from one is accepted by the other."""
    return float(np.minimum(draft, judge).sum(dtype=np.float64))


def judged_token(draft: np.ndarray, judge: np.ndarray, rng: np.random.Generator) -> tuple[int, bool]:
    """Return one draw of the judge's distribution [vocab], and whether it is the token that was drafted first.

    That is speculative sampling: a refused token is replaced by one drawn from max(judge - draft, 0).
    """
    token = draw(draft, rng)
    if rng.random() * draft[token] < judge[token]:
        return token, True
    return draw(np.maximum(judge - draft, 0), rng), False


def judged(draft: Policy, judge: Policy, count: int, length: int, rng: np.random.Generator) -> list[Tokens]:
    """Return first tokens of answers. What follows a refused token is drafted anew, as in chunks of any length."""
    found: list[Tokens] = [()] * count
    for _ in range(length):
        both = zip(found, draft(found), judge(found))
        found = [(*tokens, judged_token(drafted, wanted, rng)[0]) for tokens, drafted, wanted in both]
    return found


def ranks(judge: Policy, tokens: Tokens, most: int = 7) -> Tokens:
    """Return each token's rank among the judge's likeliest after its prefix, from 0; `most` for all others."""
    chances = zip(judge([tokens[:i] for i in range(len(tokens))]), tokens)
    return tuple(min(int((after > after[token]).sum()), most) for after, token in chances)


def two_samples(
    one: list[Tokens], other: list[Tokens], rng: np.random.Generator, shuffles: int = 400
) -> tuple[float, list[float]]:
    """Return the total variation of two samples, and those of the two thrown together and parted at random."""
    kinds = {answer: i for i, answer in enumerate(dict.fromkeys([*one, *other]))}
    both = np.array([kinds[answer] for answer in [*one, *other]])

    def parted(order: np.ndarray) -> float:
        return total_variation(*(frequencies(part, len(kinds)) for part in np.split(order, [len(one)])))

    return parted(both), [parted(rng.permutation(both)) for _ in range(shuffles)]


def combined(
    reference: Float[Tensor, "*any vocab"], parts: Sequence[Float[Tensor, "*any vocab"]], weights: Sequence[float]
) -> Float[Tensor, "*any vocab"]:
    """Return one token's log-probabilities under reference * product of (part_i / reference) ** weight_i, of theirs."""
    moved = sum((a * (part - reference) for a, part in zip(weights, parts)), start=reference)
    return moved.log_softmax(dim=-1)


def accepted(log_ratios: np.ndarray, rng: np.random.Generator, largest: float | None = None) -> int | None:
    """Return the first chunk of a window that is accepted, as an index; None where none is.

    `largest` is the largest log ratio of all chunks, where it is known; by default the window's own.
    """
    bound = log_ratios.max() if largest is None else largest
    taken = np.flatnonzero(np.log(rng.random(len(log_ratios))) <= log_ratios - bound)
    return int(taken[0]) if len(taken) else None


def acceptance(log_ratios: np.ndarray) -> float:
    """Return the mean probability that a chunk of this window is accepted."""
    return float(np.exp(log_ratios - log_ratios.max()).mean())


def combined_contrasts(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    statements: Statements,
    edits: Sequence[RowEdit],
    targets: Sequence[Sequence[int]],
) -> Float[Tensor, "target pair"]:
    """Return the likelihood contrast under each target, which is `combined` of the model under the edits it numbers."""
    found = torch.zeros(len(targets), len(statements.pairs), dtype=torch.float64)
    for number, (question, pair) in enumerate(zip(statements.questions, statements.pairs)):
        for text, sign in ((pair.pos, 1), (pair.neg, -1)):
            row = encode_answer(tokenizer, chat_prompt(tokenizer, question), text)
            reference, *parts = (
                next_logprobs(model, [row], steer_rows(model, [edit]))[0].cpu() for edit in (None, *edits)
            )
            for target, members in enumerate(targets):
                logprobs = combined(reference, [parts[i] for i in members], [1] * len(members))
                found[target, number] += sign * logprobs.gather(1, torch.tensor(row[1])[:, None]).mean()
    return found
