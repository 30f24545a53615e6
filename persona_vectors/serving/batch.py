"""Rows that share decoding steps: they join and leave between two of them, each with its own edits."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, model_name
from persona_vectors.model.devices import base, input_device, virtual_tokens
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.passes import cache_argument
from persona_vectors.model.tokens import Tokens
from persona_vectors.model.wrappers import unwrap
from persona_vectors.serving.changes import change_prompt, change_rows
from persona_vectors.serving.rows import Row
from persona_vectors.vectors.directions import projections, unit_directions
from persona_vectors.vectors.vector import PersonaVector

Values = dict[int, Float[Tensor, "row vector"]]
"""Projections of the last token of each row on all vectors, by layer."""


class Batch:
    """Rows in the middle of their answers, padded on the left, over one cache.

    A new row's prompt is read in a pass of its own, and its keys and values are then put beside the others'. Hooks are
    on the model while there are rows, and only then. A batch belongs to the thread that made it.
    """

    def __init__(self, model: Model, vectors: Sequence[PersonaVector]) -> None:
        self.model, self.vectors = unwrap(model), list(vectors)
        name = cache_argument(self.model)
        if name is None or virtual_tokens(self.model):
            raise InputError(f"{model_name(model)} keeps no plain cache that rows could share: it cannot be served")
        self._cache_name, self._device = name, input_device(self.model)
        last = "logits_to_keep" in inspect.signature(base(self.model).forward).parameters
        self._last = {"logits_to_keep": 1} if last else {}
        self._units: dict[int, Tensor] = {}
        self._hooks: ExitStack | None = None
        self.values: Values = {}
        self.clear()

    def clear(self) -> None:
        """Forget every row."""
        self._close()
        self.rows: list[Row] = []
        self.cache = DynamicCache()
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=self._device)

    @torch.inference_mode()
    def join(self, row: Row) -> tuple[Float[Tensor, "1 vocab"], Values]:
        """Read a row's prompt and take the row in; return what its pass says of its first token."""
        self._close()
        cache, ids = DynamicCache(), torch.tensor([row.prompt], device=self._device)
        mask = torch.ones_like(ids)
        with change_prompt(self.model, row.changes), self._reading(row.layers):
            logits = self._run(ids, mask, mask.cumsum(dim=1) - 1, cache, {} if row.job.echo else self._last)
        if row.job.echo:
            row.read_prompt(logits[0])
        if self.rows:
            width = max(self.mask.shape[1], len(row.prompt))
            for own, new in zip(_layers(self.cache), _layers(cache)):  # into the new: an error leaves the old one whole
                new.keys = torch.cat([_widened(own.keys, width), _widened(new.keys, width)])
                new.values = torch.cat([_widened(own.values, width), _widened(new.values, width)])
            mask = torch.cat([nn.functional.pad(each, (width - each.shape[1], 0)) for each in (self.mask, mask)])
        self.cache, self.mask = cache, mask
        self.rows.append(row)
        return logits[:, -1].float(), self.values

    @torch.inference_mode()
    def keep(self, kept: Sequence[int]) -> None:
        """Let the other rows leave, and the columns that are then padding in every row."""
        if not kept:
            self.clear()
            return
        self._close()
        self.rows = [self.rows[i] for i in kept]
        self.cache.batch_select_indices(torch.tensor(kept, device=self._device))
        self.mask = self.mask[list(kept)]
        begin = int(self.mask.argmax(dim=1).min())
        self.mask = self.mask[:, begin:]
        for layer in _layers(self.cache):
            layer.keys, layer.values = layer.keys[:, :, begin:], layer.values[:, :, begin:]

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> tuple[Float[Tensor, "row vocab"], Values]:
        """Read one token of each row; return what the pass says of the next one."""
        if self._hooks is None:
            with ExitStack() as stack:
                stack.enter_context(change_rows(self.model, [row.changes for row in self.rows]))
                stack.enter_context(self._reading(frozenset[int]().union(*(row.layers for row in self.rows))))
                self._hooks = stack.pop_all()
        ids = torch.tensor(tokens, device=self._device)[:, None]
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        logits = self._run(ids, self.mask, self.mask.sum(dim=1, keepdim=True) - 1, self.cache, self._last)
        return logits[:, -1].float(), self.values

    def fail(self, error: BaseException) -> None:
        """Take the hooks away and forget every row, after a pass that was cut short by an error."""
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            with suppress(type(error)):
                hooks.__exit__(type(error), error, error.__traceback__)
        self.clear()

    def _run(
        self, ids: Int[Tensor, "row token"], mask: Tensor, position: Tensor, cache: DynamicCache, last: dict[str, int]
    ) -> Float[Tensor, "row read vocab"]:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": position, self._cache_name: cache}
        return self.model(**given, use_cache=True, **last).logits

    def _close(self) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.close()

    @contextmanager
    def _reading(self, layers: frozenset[int]) -> Iterator[None]:
        """Keep the last token's projections on all vectors, after the edits."""
        for layer in layers - self._units.keys():
            self._units.update(unit_directions(self.model, self.vectors, layer))
        self.values = {}

        def reader(layer: int):
            def read(hidden: Tensor, _tokens: Tokens) -> None:
                units = self._units[layer] = self._units[layer].to(hidden.device)
                self.values[layer] = projections(hidden[:, -1:], units)[:, 0]

            return read

        with edit_blocks(self.model, {layer: reader(layer) for layer in layers}) if layers else nullcontext():
            yield


def _layers(cache: DynamicCache) -> Any:
    """Return a cache's layers, all of which keep keys and values: `cache_argument` has seen to that."""
    return cache.layers


def _widened(states: Float[Tensor, "row head token size"], width: int) -> Float[Tensor, "row head token2 size"]:
    return nn.functional.pad(states, (0, 0, width - states.shape[2], 0))
