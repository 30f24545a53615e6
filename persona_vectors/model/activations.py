"""Mean activations of prompts and answers at every layer, read in hooks: from finished text, or while generating."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.models import Model, batch_tokens_for, left_pad, length_batches, model_shape
from persona_vectors.model.tokens import Tokens
from persona_vectors.model.wrappers import keeps_cache

POOLINGS = ("response_mean", "prompt_mean", "prompt_last")
Row = tuple[Sequence[int], Sequence[int]]
"""The token ids of a templated prompt, and of the answer that follows it."""


@dataclass
class Pooled:
    """Mean activations of some rows: the raw outputs of every decoder block, averaged in float32."""

    means: Float[Tensor, "row pooling layer hidden"]
    norms: Float[Tensor, "row layer"]
    """Mean norm of the answer tokens' residual stream."""


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


def _cache_argument(model: Model) -> str | None:
    """Return the name of the decoder's cache argument where answers can share their prompt's cache, else None."""
    parameters = inspect.signature(model.get_decoder().forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in parameters), None)
    if name is None or "position_ids" not in parameters or model.config.is_encoder_decoder or not keeps_cache(model):
        return None
    layers = DynamicCache(config=model.config).layers
    attends = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return name if attends and len(layers) in (0, model_shape(model)[0]) else None


def forward_passes(
    model: Model, rows: Sequence[Row], *, batch_tokens: int | None = None, held_back: int = 0
) -> Iterator[Pass]:
    """Yield forward passes that together read every row, each shared prompt once; run each before the next.

    Batches hold rows of like length, at most `batch_tokens` tokens each. `held_back` tokens at the prompt's end are
    read with the answer (1 to have the logits of its first token). Models whose state cannot be shared (state-space
    and encoder-decoder models), and rows that share no prompt, are read whole.
    """
    budget = batch_tokens or batch_tokens_for(model)
    device = model.get_input_embeddings().weight.device
    cache_name = _cache_argument(model)
    prefixes: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, _) in enumerate(rows):
        prefixes.setdefault(tuple(prompt[: len(prompt) - held_back]), []).append(index)
    shared_by = {key: members for key, members in prefixes.items() if len(members) > 1 and key and cache_name}
    keys = list(shared_by)
    groups = [[keys[i] for i in group] for group in length_batches(keys, 0, budget)]
    alone = [row for key, members in prefixes.items() if key not in shared_by for row in members]
    if alone:
        shared_by[()] = alone
        groups.append([()])
    for chosen in groups:
        prefix_mask, layers = torch.zeros(len(chosen), 0, dtype=torch.long, device=device), None
        if chosen[0]:
            assert cache_name is not None
            ids, prefix_mask = left_pad(chosen, 0, device)
            cache = DynamicCache()
            yield _pass(ids, prefix_mask, prefix_mask, [shared_by[key] for key in chosen], {cache_name: cache}, False)
            layers = cache.layers
        members = [(line, row) for line, key in enumerate(chosen) for row in shared_by[key]]
        members = [(line, row) for line, row in members if len(rows[row][0]) + len(rows[row][1]) > len(chosen[line])]
        rest = [[*rows[row][0], *rows[row][1]][len(chosen[line]) :] for line, row in members]
        for batch in length_batches(rest, 0, budget):
            ids, mask = _right_pad([rest[i] for i in batch], device)
            lines = torch.tensor([members[i][0] for i in batch], device=device)
            shared = {}
            if layers is not None:
                shared = {cache_name: DynamicCache()}
                shared[cache_name].layers = [_SharedPrefix(layer, lines) for layer in layers]
            whole = torch.cat([prefix_mask[lines], mask], dim=1)
            yield _pass(ids, mask, whole, [[members[i][1]] for i in batch], shared, True)


def _pass(ids: Tensor, mask: Tensor, whole: Tensor, rows: list[list[int]], cache: dict, answers: bool) -> Pass:
    position = (whole.cumsum(dim=1) - 1)[:, -ids.shape[1] :]
    inputs = {"input_ids": ids, "use_cache": bool(cache), **cache}
    if cache:  # without one the padding is on the right, where no token sees it, and no mask is the faster way
        inputs |= {"attention_mask": whole, "position_ids": position.clamp(min=0)}
    return Pass(inputs, rows, position.masked_fill(mask == 0, -1), answers)


def _right_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    ids, mask = left_pad([row[::-1] for row in rows], 0, device)
    return ids.flip(1), mask.flip(1)


def pool(
    model: Model,
    rows: Sequence[Row],
    *,
    poolings: Sequence[str] = ("response_mean",),
    batch_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Pooled:
    """Return mean activations of finished rows at every layer, in as few forward passes of the decoder as can be.

    No logits are computed and no hidden states kept. `progress` is called with the number of answers read.
    """
    shape = (len(rows), len(poolings), *model_shape(model))
    pooled = Pooled(torch.zeros(shape), torch.zeros(shape[0], shape[2]))
    weights: Float[Tensor, "line pooling token"]
    sums: list[tuple[Tensor, Tensor]] = []

    def read(hidden: Tensor, _: Tokens) -> None:
        wide = hidden.float()
        here = weights.to(hidden.device)
        sums.append((here[:, :-1] @ wide, (here[:, -1] * wide.norm(dim=-1)).sum(dim=1)))

    decoder = model.get_decoder()
    with edit_blocks(model, dict.fromkeys(range(shape[2]), read)), torch.inference_mode():
        for step in forward_passes(model, rows, batch_tokens=batch_tokens):
            first = [rows[members[0]] for members in step.rows]
            weights = _weights(step.position, first, [*poolings, "response_mean"])
            decoder(**step.inputs)
            line = [i for i, members in enumerate(step.rows) for _ in members]
            target = torch.tensor([row for members in step.rows for row in members])
            pooled.means.index_add_(0, target, torch.stack([s.cpu() for s, _ in sums], dim=2)[line])
            pooled.norms.index_add_(0, target, torch.stack([n.cpu() for _, n in sums], dim=1)[line])
            sums.clear()
            if progress and step.answers:
                progress(len(step.rows))
    return pooled


def _weights(position: Tensor, rows: Sequence[Row], poolings: Sequence[str]) -> Float[Tensor, "line pooling token"]:
    """Return the weight of each token in each pooling: all of a row's weights add up to 1, over all its passes."""
    prompt = torch.tensor([[len(row[0])] for row in rows], device=position.device)
    answer = torch.tensor([[len(row[1])] for row in rows], device=position.device)
    in_prompt = (position >= 0) & (position < prompt)
    of = {
        "response_mean": (position >= prompt) / answer.clamp(min=1),
        "prompt_mean": in_prompt / prompt,
        "prompt_last": (position == prompt - 1).float(),
    }
    return torch.stack([of[name] for name in poolings], dim=1)


class _Running:
    """Sums over the tokens of a batch of answers that is being generated."""

    def __init__(self, model: Model, poolings: Sequence[str], stops: Sequence[int]) -> None:
        self.poolings, self.stops, self.layers = poolings, stops, model_shape(model)[0]
        self.means: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.alive: Bool[Tensor, "line 1"] | None = None

    def read(self, layer: int, hidden: Tensor, tokens: Tokens) -> None:
        if not tokens.decoding:
            return self._read_prompt(layer, hidden, tokens)
        if layer == 0:
            assert tokens.input_ids is not None and self.alive is not None
            for stop in self.stops:
                self.alive = self.alive & (tokens.input_ids != stop)
            self.weight = self.alive.float()
            self.count += self.weight
        weight, state = self.weight.to(hidden.device), hidden[:, 0].float()
        self.norms[layer].addcmul_(torch.linalg.vector_norm(state, dim=1, keepdim=True), weight)
        if "response_mean" in self.poolings:
            self.means[layer][:, self.poolings.index("response_mean")].addcmul_(state, weight)

    def _read_prompt(self, layer: int, hidden: Tensor, tokens: Tokens) -> None:
        if layer == 0:
            self.means, self.norms = [], []
            self.alive = torch.ones(tokens.batch, 1, dtype=torch.bool, device=tokens.device)
            self.count = torch.zeros(tokens.batch, 1, device=tokens.device)
            real, answering = tokens.select("prompt"), tokens.select("response")
            assert real is not None and answering is not None
            last = real & answering
            shares = {"prompt_mean": real / real.sum(dim=1, keepdim=True), "prompt_last": last.float()}
            nothing = torch.zeros_like(shares["prompt_last"])
            self.prompt_weights = torch.stack([shares.get(name, nothing) for name in self.poolings], dim=1)
        self.means.append(self.prompt_weights.to(hidden.device) @ hidden.float())
        self.norms.append(torch.zeros(hidden.shape[0], 1, device=hidden.device))

    def pooled(self) -> Pooled:
        """Return the means of the answers read so far."""
        count = self.count.clamp(min=1).cpu()
        means = torch.stack([mean.cpu() for mean in self.means], dim=2)
        if "response_mean" in self.poolings:
            means[:, self.poolings.index("response_mean")] /= count[:, None]
        return Pooled(means, torch.cat([norm.cpu() for norm in self.norms], dim=1) / count)


@contextmanager
def pool_while_generating(
    model: Model, *, stops: Sequence[int], poolings: Sequence[str] = ("response_mean",)
) -> Iterator[Callable[[], Pooled]]:
    """Average the activations of the answers that one cached `generate` call makes inside the `with`.

    Yields a function that returns the `Pooled` means once `generate` has returned. `stops` are the tokens that end an
    answer; they and what follows are left out. The last token that `generate` samples is never fed back, so it is not
    averaged: ask for one token more than you keep.
    """
    running = _Running(model, list(poolings), stops)

    def reader(layer: int) -> Callable[[Tensor, Tokens], None]:
        return lambda hidden, tokens: running.read(layer, hidden, tokens)

    with edit_blocks(model, {layer: reader(layer) for layer in range(running.layers)}):
        yield running.pooled
