"""Forward passes over finished rows; what their prompts share is read once."""

import inspect
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
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

WORTH = 16
"""How many tokens different prompts have to begin with alike for these to be read once."""

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
    """False where it reads only a prompt that its rows share, or what theirs begin with."""
    attempt: Attempt
    """What to run it in: where that fails for want of memory, its rows come again in smaller passes."""


class SharedPrefix(DynamicLayer):
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
    """Yield forward passes that together read every row, what prompts share once; run each before the next.

    That is a prompt that several answers follow, or what different prompts begin with (see `alike`). Batches hold rows
    of like length, at most `batch_tokens` tokens each. `held_back` tokens at the prompt's end are read with the answer
    (1 to have the logits of its first token). Rows of different `groups`, a value for each, share nothing: those that
    are edited differently. Models whose state cannot be shared (state-space and encoder-decoder models), and rows that
    share no prompt, are read whole.
    """
    model = unwrap(model)
    budget = Budget(model, "passes", batch_tokens or batch_tokens_for(model))
    check_length(model, max((len(prompt) + len(answer) for prompt, answer in rows), default=0))
    device = input_device(model)
    cache_name = cache_argument(model)
    grouped: dict[Hashable, list[int]] = {}
    for index in range(len(rows) if cache_name else 0):
        grouped.setdefault(None if groups is None else groups[index], []).append(index)
    shared: list[tuple[Sequence[int], list[int]]] = []
    for members in grouped.values():
        prompts = [tuple(rows[row][0][: len(rows[row][0]) - held_back]) for row in members]
        shared += [(prompts[same[0]][:length], [members[i] for i in same]) for length, same in alike(prompts)]
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


def alike(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, list[int]]]:
    """Return which prompts begin alike, and for how many tokens: what saves most tokens if it is read once.

    Prompts that are the same are so whatever their length; others for `WORTH` tokens or more, the last of none.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    ordered = [prompts[i] for i in order]
    equal = [_common(a, b) for a, b in pairwise(ordered)]
    parts = [(i, i, 0, list[tuple[int, int, int]]()) for i in range(len(order))]
    """What has been joined so far, known at both of its ends: the ends, the tokens saved and what is shared."""
    for left in sorted(range(len(equal)), key=lambda i: -equal[i]):
        (first, _, before, chosen), (_, last, after, more) = parts[left], parts[left + 1]
        same = ordered[first] == ordered[last]
        length = equal[left] if same else min(equal[left], len(ordered[first]) - 1)
        saved = (last - first) * length if same or length >= WORTH else 0
        together = saved > before + after
        part = first, last, max(saved, before + after), [(length, first, last)] if together else chosen + more
        parts[first] = parts[last] = part
    found = parts[0][3] if parts else []
    return [(length, order[first : last + 1]) for length, first, last in found]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return len(a) if a == b else next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


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
            lent[name].layers = [SharedPrefix(layer, lines) for layer in cache.layers]
        whole = torch.cat([prefix_mask[lines], mask], dim=1)
        yield _pass(ids, mask, whole, [[members[i][1]] for i in batch], lent, attempt, budget, answers=True)


def read_pass(model: Model, step: Pass) -> None:
    """Run one pass for what the hooked blocks read of it: the decoder without its head, so that no logits are computed.

    The whole model is run where it does something on the way to its decoder: an adapter's virtual tokens, or weights
    that are gathered from other processes.
    """
    model = unwrap(model)
    if runs_whole(model):
        read_logits(model, step, 1)
    else:
        model.get_decoder()(**step.inputs)


def read_logits(model: Model, step: Pass, count: int) -> Float[Tensor, "line token vocab"]:
    """Run one pass and return the logits of its last tokens; no others are computed, where the model can leave them."""
    model = unwrap(model)
    keep = {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(base(model).forward).parameters else {}
    return model(**step.inputs, **keep).logits[:, -count:]


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
