"""Forward passes over finished rows, each shared prompt read once."""

import inspect
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from persona_vectors.data.progress import pulse
from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.devices import base, input_device, virtual_tokens
from persona_vectors.model.memory import Attempt, Budget
from persona_vectors.model.prompts import batch_tokens_for, check_length, left_pad
from persona_vectors.model.wrappers import keeps_cache, unwrap

Row = tuple[Sequence[int], Sequence[int]]
"""The token ids of a templated prompt, and of the answer that follows it."""


@dataclass
class Pass:
    """One forward pass over a part of some rows."""

    inputs: dict[str, Any]
    rows: list[list[int]]
    """For each line of the batch, the rows that it is a part of: several where it is a prompt that they share."""
    position: Int[Tensor, "line token"]
    """Each token's place in its row, prompt and answer together; -1 for padding."""
    answers: bool
    """False where it reads only a shared prompt."""
    attempt: Attempt
    """What to run it in: where that fails for want of memory, its rows come again in smaller passes."""


class _SharedPrefix(DynamicLayer):
    """One layer's keys and values of some prompts, lent to the answers that follow them and never grown."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any, lines: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.lines = layer.keys, layer.values, lines
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        lines = self.lines.to(self.keys.device)
        keys, values = self.keys[lines], self.values[lines]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def cache_argument(model: Model) -> str | None:
    """Return the name of the decoder's cache argument where answers can share their prompt's cache, else None."""
    model = unwrap(model)
    parameters = inspect.signature(model.get_decoder().forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in parameters), None)
    if name is None or "position_ids" not in parameters or model.config.is_encoder_decoder or not keeps_cache(model):
        return None
    if runs_whole(model):
        return None
    layers = DynamicCache(config=model.config).layers
    attends = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return name if attends and len(layers) in (0, model_shape(model)[0]) else None


def forward_passes(
    model: Model,
    rows: Sequence[Row],
    *,
    batch_tokens: int | None = None,
    held_back: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Iterator[Pass]:
    """Yield forward passes that together read every row, each shared prompt once; run each before the next.

    Batches hold rows of like length, at most `batch_tokens` tokens each. `held_back` tokens at the prompt's end are
    read with the answer (1 to have the logits of its first token). Rows of different `groups`, a value
    for each, share no prompt: those that are edited differently. Models whose state cannot be shared (state-space and
    encoder-decoder models), and rows that share no prompt, are read whole.
    """
    model = unwrap(model)
    budget = Budget(model, "passes", batch_tokens or batch_tokens_for(model))
    check_length(model, max((len(prompt) + len(answer) for prompt, answer in rows), default=0))
    device = input_device(model)
    cache_name = cache_argument(model)
    prefixes: dict[tuple[Sequence[int], Hashable], list[int]] = {}
    for index, (prompt, _) in enumerate(rows):
        group = None if groups is None else groups[index]
        prefixes.setdefault((tuple(prompt[: len(prompt) - held_back]), group), []).append(index)
    shared: list[tuple[Sequence[int], list[int]]]
    shared = [(key, members) for (key, _), members in prefixes.items() if len(members) > 1 and key and cache_name]
    for batch, attempt in budget.batches([key for key, _ in shared]):
        assert cache_name is not None
        chosen, cache = [shared[i] for i in batch], DynamicCache()
        ids, mask = left_pad([key for key, _ in chosen], 0, device)
        given: dict[str, Any] = {cache_name: cache}
        yield _pass(ids, mask, mask, [lines for _, lines in chosen], given, attempt, budget, answers=False)
        if not attempt.failed:
            yield from _answer_passes(rows, chosen, mask, given, budget)
    known = {row for _, members in shared for row in members}
    alone = [row for row in range(len(rows)) if row not in known]
    if alone:
        yield from _answer_passes(rows, [((), alone)], torch.zeros(1, 0, dtype=torch.long, device=device), {}, budget)


def _answer_passes(
    rows: Sequence[Row],
    chosen: Sequence[tuple[Sequence[int], list[int]]],
    prefix_mask: Tensor,
    given: dict[str, Any],
    budget: Budget,
) -> Iterator[Pass]:
    """Yield the passes over what follows the prefixes that are `given` as a cache; over whole rows where it is none."""
    members = [(line, row) for line, (_, lines) in enumerate(chosen) for row in lines]
    known_tokens = [len(key) for key, _ in chosen]
    members = [(line, row) for line, row in members if len(rows[row][0]) + len(rows[row][1]) > known_tokens[line]]
    rest = [[*rows[row][0], *rows[row][1]][known_tokens[line] :] for line, row in members]
    for batch, attempt in budget.batches(rest):
        ids, mask = _right_pad([rest[i] for i in batch], prefix_mask.device)
        lines = torch.tensor([members[i][0] for i in batch], device=prefix_mask.device)
        lent: dict[str, Any] = {name: DynamicCache() for name in given}
        for name, cache in given.items():
            lent[name].layers = [_SharedPrefix(layer, lines) for layer in cache.layers]
        whole = torch.cat([prefix_mask[lines], mask], dim=1)
        yield _pass(ids, mask, whole, [[members[i][1]] for i in batch], lent, attempt, budget, answers=True)


def read_pass(model: Model, step: Pass) -> None:
    """Run one pass for what the hooked blocks read of it: the decoder without its head, so that no logits are computed.

    The whole model is run where it does something on the way to its decoder: an adapter's virtual tokens, or weights
    that are gathered from other processes.
    """
    model = unwrap(model)
    if runs_whole(model):
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base(model).forward).parameters else {}
        model(**step.inputs, **keep)
    else:
        model.get_decoder()(**step.inputs)


def runs_whole(model: Model) -> bool:
    """Say whether the decoder cannot be run without what is around it."""
    sharded = any(cls.__name__ == "FSDPModule" for cls in type(unwrap(model)).__mro__)  # slow to import
    return virtual_tokens(model) or sharded


def own_tokens(hidden: Float[Tensor, "line read hidden"], step: Pass) -> Float[Tensor, "line token hidden"]:
    """Return the hidden states, or logits, of a pass's own tokens, without an adapter's virtual ones before them."""
    return hidden[:, -step.position.shape[1] :]


def _pass(
    ids: Tensor,
    mask: Tensor,
    whole: Tensor,
    rows: list[list[int]],
    cache: dict,
    attempt: Attempt,
    budget: Budget,
    *,
    answers: bool,
) -> Pass:
    budget.begun += ids.numel()
    pulse(f"token {budget.begun:,}")
    position = (whole.cumsum(dim=1) - 1)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "use_cache": bool(cache), **cache}
    if cache:  # without one the padding is on the right, where no token sees it, and no mask is the faster way
        inputs |= {"attention_mask": whole, "position_ids": position.clamp(min=0)}
    return Pass(inputs, rows, position.masked_fill(mask == 0, -1), answers, attempt)


def _right_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    ids, mask = left_pad([row[::-1] for row in rows], 0, device)
    return ids.flip(1), mask.flip(1)
