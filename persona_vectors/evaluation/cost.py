"""What an edit costs on neutral text, so that vectors and methods are compared at equal cost."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import bar
from persona_vectors.data.texts import neutral_texts
from persona_vectors.model.blocks import Model, one_layer
from persona_vectors.model.passes import Row
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.model.thoughts import edit_positions
from persona_vectors.model.tokens import answers_at
from persona_vectors.model.wrappers import unwrap
from persona_vectors.steering.add import RowEdit, steer_rows
from persona_vectors.vectors.directions import layer_for
from persona_vectors.vectors.vector import PersonaVector

_STEP, _FURTHEST = math.log(4), math.log(4**8)
"""By how much strengths are raised and lowered until they enclose the one that is sought, and how far."""


def coef_at_kl(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    *,
    layer: SupportsIndex | None = None,
    kl: float = 1.0,
    percentile: float = 95.0,
    positions: str = "all",
    texts: Sequence[tuple[str, str]] | None = None,
) -> float:
    """Return the coefficient at which steering changes neutral text as much as `kl` says: a strength by its cost.

    The cost is the divergence KL(plain | steered) of the next token's distribution, in nats, at the answer tokens of
    `texts`, questions and answers, by default on plain facts: returned is the coefficient, to 1 %, at which its
    `percentile` over the tokens reaches `kl`. So vectors and layers compare at equal cost, whatever their lengths.
    Without a layer it is the recommended one; `positions` are those of `steer`, or the name of a `Span`.

    Raises InputError where no coefficient reaches it.
    """
    if not (kl > 0 and 0 < percentile <= 100):
        raise InputError(f"kl is {kl} and percentile {percentile}: give a positive number, and one up to 100")
    place = one_layer(layer_for([vector], layer, purpose="steer"), len(vector.directions))
    where = edit_positions(tokenizer, positions)
    cost = kl_cost(
        model,
        tokenizer,
        lambda coef: steer_rows(model, [RowEdit(vector, place, coef, where)]),
        percentile=percentile,
        texts=texts,
    )
    return strength_at(cost, kl, of=f"{vector!r} at layer {place}")


def kl_cost(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    edit: Callable[[float], AbstractContextManager[Any]],
    *,
    percentile: float = 95.0,
    texts: Sequence[tuple[str, str]] | None = None,
) -> Callable[[float], float]:
    """Return what gives the cost, as in `coef_at_kl`, of any edit at a strength: `lambda s: pv.floor(..., limit=s)`."""
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, asked), text) for asked, text in texts or neutral_texts()]
    plain = next_logprobs(model, rows)

    @cache
    def cost(strength: float) -> float:
        edited = next_logprobs(model, rows, edit(strength))
        return float(token_kls(plain, edited).double().quantile(percentile / 100))

    return cost


def strength_at(cost: Callable[[float], float], kl: float, *, of: str, tolerance: float = 0.005) -> float:
    """Return the positive strength at which a cost that grows with it reaches `kl`, to a share of `tolerance`.

    Raises InputError where no strength `of` this edit does.
    """

    @cache
    def excess(log_strength: float) -> float:
        """Return log(cost / kl); it is about twice the logarithm of the strength, while that is small."""
        value = cost(math.exp(log_strength))
        return math.log(max(value, 1e-12) / kl) if math.isfinite(value) else 99.0

    low = high = 0.0
    while excess(high) < 0 and high < _FURTHEST:
        high += _STEP
    low = max(high - _STEP, low)
    while excess(low) >= 0 and low > -_FURTHEST:
        low -= _STEP
    if not excess(low) < 0 <= excess(high):
        raise InputError(f"no strength of {of} has a KL of {kl:g}: give another kl")
    return math.exp(brentq(excess, low, high, xtol=tolerance))


def edit_success(pos: Tensor, neg: Tensor, pos_before: Tensor) -> Tensor:
    """Return the edit success ES of statements (Mao et al. 2023, arXiv 2310.02168), 0 to 1.

    Given are the log-probabilities of wanted statements and of their opposites, and of the wanted ones before the edit.
    """
    return (pos - neg).sigmoid() * (pos - pos_before).exp().clamp(max=1)


def coef_at(success: Callable[[float], float], wanted: float, full: float) -> float:
    """Return the coefficient that has a success; nan where it is not reached at one, two or four times `full`."""
    if success(0.0) >= wanted:
        return 0.0
    most = next((times * full for times in (1, 2, 4) if success(times * full) >= wanted), math.nan)
    return most if math.isnan(most) else brentq(lambda coef: success(coef) - wanted, 0, most, xtol=full / 100)


def token_kls(
    before: Sequence[Float[Tensor, "_ vocab"]], after: Sequence[Float[Tensor, "_ vocab"]]
) -> Float[Tensor, " token"]:
    """Return KL(before | after) in nats at every token of some texts, of `next_logprobs`."""
    return torch.cat([(p.exp() * (p - q)).sum(dim=-1) for p, q in zip(before, after)])


def next_logprobs(
    model: Model, rows: Sequence[Row], edit: AbstractContextManager[Any] | None = None
) -> list[Float[Tensor, "token vocab"]]:
    """Return all tokens' log-probabilities at each of a row's answer tokens, under an edit or as the model is."""
    model, found = unwrap(model), []
    with edit or nullcontext(), torch.inference_mode(), bar(rows, desc="divergence from plain", unit="text") as shown:
        for prompt, answer in shown:
            ids = torch.tensor([prompt + answer], device=model.device)
            place = torch.arange(ids.shape[1], device=ids.device)[None] - len(prompt)
            with answers_at(place, [prompt]):
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            found.append(logits.float().log_softmax(dim=-1))
    return found
