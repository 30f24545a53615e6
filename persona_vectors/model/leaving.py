"""Answers that have ended leave the batch: the blocks read the others alone."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from persona_vectors.model.blocks import Model, decoder_layers
from persona_vectors.model.prefill import can_take_rows, taken
from persona_vectors.model.wrappers import unwrap


@contextmanager
def ended_rows_leave(model: Model, stops: Sequence[int]) -> Iterator[None]:
    """Have blocks and head leave out the rows that have ended, in the next call of `generate`, half of them at a time.

    Only inside of them are there fewer rows: hooks on them, and all that is around them, see every row, with values
    that mean nothing after a row's end. Models whose state cannot be divided go on with all rows.
    """
    model = unwrap(model)
    with ExitStack() as hooks:
        if stops and can_take_rows(model):
            _Leaving(model, stops, hooks)
        yield


class _Leaving:
    """The rows of one call that have not ended, and the hooks that give blocks no others."""

    def __init__(self, model: Any, stops: Sequence[int], hooks: ExitStack) -> None:
        self.model, self.stops, self.hooks = model, torch.tensor(stops), hooks
        self.thread = threading.get_ident()
        self.alive: Tensor | None = None
        """Which rows have not ended, [row]."""
        self.kept: Tensor | None = None
        """The rows that are left in the cache."""
        self._add(model.get_decoder().register_forward_pre_hook, self._begin, with_kwargs=True)

    def _add(self, register: Any, hook: Any, **options: bool) -> None:
        def own(*args: Any) -> Any:  # another thread's pass through the same model is none of ours
            return hook(*args) if threading.get_ident() == self.thread else None

        self.hooks.callback(register(own, **options).remove)

    def _begin(self, _decoder: nn.Module, args: Any, kwargs: Any) -> None:
        """See which rows have ended, and once half of those in the cache have, let them leave it."""
        ids = args[0] if args else kwargs.get("input_ids")
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, DynamicCache)), None)
        if ids is None or ids.shape[1] > 1 or cache is None or not cache.get_seq_length():
            return  # a prompt
        ended = torch.isin(ids[:, -1], self.stops.to(ids.device))
        self.alive = ~ended if self.alive is None else self.alive & ~ended
        left, count = int(self.alive.sum()), len(ids) if self.kept is None else len(self.kept)
        if 0 < left <= count // 2:
            self._leave(cache, len(ids))

    def _leave(self, cache: DynamicCache, rows: int) -> None:
        assert self.alive is not None
        before = torch.arange(rows, device=self.alive.device) if self.kept is None else self.kept
        first, stay = self.kept is None, self.alive[before].nonzero()[:, 0]
        self.kept = before[stay]
        for layer in cache.layers:
            if layer.is_initialized and len(layer.keys) == len(before):
                layer.batch_select_indices(stay.to(layer.keys.device))
        self.lines = torch.zeros(rows, dtype=torch.long, device=self.alive.device)
        self.lines[self.kept] = torch.arange(len(self.kept), device=self.alive.device)
        if first:
            head = self.model.get_output_embeddings()
            for module in (*decoder_layers(self.model), *([] if head is None else [head])):
                self._add(module.register_forward_pre_hook, self._before, with_kwargs=True)
                self._add(module.register_forward_hook, self._after, prepend=True)

    def _before(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give a module the rows that are left."""
        return taken((args, kwargs), self.kept, len(self.lines))

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Give its output to all rows, before any other hook sees it; those that have ended get another's."""
        assert self.kept is not None
        return taken(output, self.lines, len(self.kept))
