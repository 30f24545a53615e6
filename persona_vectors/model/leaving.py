"""Answers that have ended leave the batch: the blocks read the others alone."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import DynamicCache

from persona_vectors.model.blocks import Model, decoder_layers
from persona_vectors.model.devices import constant
from persona_vectors.model.prefill import add_hook, can_take_rows, take_cache_rows, taken
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
        self.model, self.stops, self.add = model, constant(torch.tensor(stops)), partial(add_hook, hooks)
        self.alive: Bool[Tensor, " row"] | None = None
        self.kept: Int[Tensor, " kept"] | None = None
        """The rows that are left in the cache; None: all of them."""
        self.lines: Int[Tensor, " row"]
        """Where each row is among those kept; 0 for one that has ended."""
        self.add(model.get_decoder().register_forward_pre_hook, self._begin, with_kwargs=True)

    def _begin(self, _decoder: nn.Module, args: Any, kwargs: Any) -> None:
        """See which rows have ended, and once half of those in the cache have, let them leave it."""
        ids = args[0] if args else kwargs.get("input_ids")
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, DynamicCache)), None)
        if ids is None or ids.shape[1] > 1 or cache is None or not cache.get_seq_length():
            return  # a prompt
        ended = torch.isin(ids[:, -1], self.stops(ids.device))
        self.alive = ~ended if self.alive is None else self.alive & ~ended
        before = torch.arange(len(ids), device=ids.device) if self.kept is None else self.kept
        if not 0 < int(self.alive.sum()) <= len(before) // 2:
            return
        stay = self.alive[before].nonzero()[:, 0]
        take_cache_rows(cache, stay, len(before))
        if self.kept is None:
            self._add_hooks()
        self.kept = before[stay]
        self.lines = torch.zeros_like(self.alive, dtype=torch.long)
        self.lines[self.kept] = torch.arange(len(self.kept), device=ids.device)

    def _add_hooks(self) -> None:
        head = self.model.get_output_embeddings()
        for module in (*decoder_layers(self.model), *([] if head is None else [head])):
            self.add(module.register_forward_pre_hook, self._before, with_kwargs=True)
            self.add(module.register_forward_hook, self._after, prepend=True)

    def _before(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give a module the rows that are left."""
        assert self.kept is not None
        return taken((args, kwargs), self.kept, len(self.lines))

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Give its output to all rows, before any other hook sees it; those that have ended get another's."""
        assert self.kept is not None
        return taken(output, self.lines, len(self.kept))
