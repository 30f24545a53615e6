"""What the prompts of a batch begin with, read once in each block of a call's first pass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from persona_vectors.model.passes import SharedPrefix, alike

SHARE = 0.85
"""Which share of a batch's tokens may be left at most for beginnings to be read apart: it takes a call more a block."""


class _Undivided(Exception):
    """Raised where a block is given, or returns, what cannot be divided by tokens."""


class _Part(NamedTuple):
    """Lines of tokens that are read together, as rows and columns of the batch."""

    rows: Int[Tensor, " line"]
    columns: Int[Tensor, "line token"]
    keys: Int[Tensor, "line key"]
    """What they may attend to."""
    allowed: Bool[Tensor, "line one key"]
    forced: Bool[Tensor, "line token key"]
    """Columns that stand in a line to fill it see themselves."""

    def of(self, given: Any, shape: tuple[int, int], cache: Any, name: str = "") -> Any:
        """Return a block's arguments, for [row, token] of `shape`, for these tokens alone and a cache of theirs."""
        if isinstance(given, dict):
            return {key: self.of(value, shape, cache, str(key)) for key, value in given.items()}
        if isinstance(given, (tuple, list)):
            return type(given)([self.of(value, shape, cache, name) for value in given])
        if isinstance(given, DynamicCache):
            return cache
        if not isinstance(given, Tensor) or not given.ndim:
            return given
        if name == "position_ids" and given.ndim == 3:  # a place for each axis of an image
            return torch.stack([self.of(axis, shape, cache) for axis in given])
        if len(given) not in (1, shape[0]) or given.ndim < 2:
            raise _Undivided
        rows, columns = self.rows.to(given.device), self.columns.to(given.device)
        if "mask" in name and given.shape[1:] == (given.shape[1], shape[1], shape[1]):
            return self._mask(given, rows if len(given) > 1 else torch.zeros_like(rows), columns)
        if given.shape[1] != shape[1]:
            raise _Undivided
        return given[rows[:, None] if len(given) > 1 else 0, columns]

    def _mask(self, mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        place = rows[:, None, None], slice(None), columns[:, :, None], self.keys.to(mask.device)[:, None]
        seen = mask[place].permute(0, 3, 1, 2)
        allowed, forced = self.allowed[:, None].to(mask.device), self.forced[:, None].to(mask.device)
        if mask.dtype == torch.bool:
            return (seen & allowed) | forced
        return seen.masked_fill(~allowed, torch.finfo(mask.dtype).min).masked_fill(forced, 0)


class _Rests(SharedPrefix):
    """Keys and values of beginnings, lent to the rests that follow them; remembers both together."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.whole = super().update(key_states, value_states)
        return self.whole


class Beginnings:
    """The prompts of a batch, padded on the left, as lines that begin them and lines of their rests.

    A block reads the beginnings first, with a cache of their own, then the rests, which attend to them: by the mask
    that it was given, rearranged, so that every token sees what it would see anyway. Output and cache are put in order.
    """

    def __init__(self, prompts: Sequence[tuple[int, ...]]) -> None:
        lengths, self.width = torch.tensor([[len(prompt)] for prompt in prompts]), max(map(len, prompts))
        self.shape = len(prompts), self.width
        groups = alike(prompts)
        self.longest = max((length for length, _ in groups), default=0)
        known = {row for _, rows in groups for row in rows}
        groups += [(min(self.longest, len(prompts[i]) - 1), [i]) for i in range(len(prompts)) if i not in known]
        begun = torch.zeros_like(lengths)
        self.line = torch.zeros(len(prompts), dtype=torch.long)
        for line, (length, rows) in enumerate(groups):
            self.line[rows], begun[rows] = line, length
        rest = int((lengths - begun).max())
        read = len(groups) * self.longest + len(prompts) * rest
        self.shared = self.longest > 0 and read <= SHARE * len(prompts) * self.width
        """False as soon as a block cannot read them apart, or rows that begin alike have been edited differently."""
        if not self.shared:
            return
        pad, self.first = self.width - lengths, torch.tensor([rows[0] for _, rows in groups])
        turn, column = pad + begun, torch.arange(self.width)
        own = turn - self.longest + torch.arange(self.longest)
        self.columns, self.real = own.clamp(min=0), own >= pad
        """Which columns of each row stand in its beginning's line, and which of those are its own tokens."""
        after = column - self.width + rest
        self.source = (torch.where(column < turn, column - turn, after) + self.longest).clamp(min=0)
        """Where each column is in the line of its beginning with that of its rest after it."""
        real, columns = self.real[self.first], self.columns[self.first]
        forced = ~real[:, :, None] & torch.eye(self.longest, dtype=torch.bool)
        self.begin = _Part(self.first, columns, columns, real[:, None], forced)
        columns = column[-rest:].expand(len(prompts), rest)
        real, keys = columns >= turn, torch.cat([self.columns, columns], dim=1)
        forced = ~real[:, :, None] & (torch.arange(keys.shape[1]) == self.longest + torch.arange(rest)[:, None])
        allowed = torch.cat([self.real, real], dim=1)[:, None]
        self.rest = _Part(torch.arange(len(prompts)), columns, keys, allowed, forced)

    def before(self, block: Any, given: tuple[tuple, dict], edited: bool) -> tuple[tuple, dict] | None:
        """Read the beginnings, and return the arguments for the rests; None where the block reads all as it is."""
        args, kwargs = given
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.shared and edited:
            own, real = self.begin._replace(rows=torch.arange(len(hidden)), columns=self.columns), self.real
            values = own.of(hidden, self.shape, None)
            self.shared = torch.equal(values[real], values[self.first][self.line][real])
        if not self.shared:
            return None
        try:
            return self._read(block, given)
        except _Undivided:
            self.shared = False
            return None

    def _read(self, block: Any, given: tuple[tuple, dict]) -> tuple[tuple, dict]:
        args, kwargs = given
        self.cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, DynamicCache)), None)
        masked = any("mask" in name and isinstance(each, Tensor) for name, each in kwargs.items())
        own: Any = DynamicCache()
        lent: Any = DynamicCache()
        begin = self.begin.of(given, self.shape, own)
        if self.cache is None or not masked:
            raise _Undivided
        output = block.forward(*begin[0], **begin[1])
        filled = [index for index, layer in enumerate(own.layers) if layer.is_initialized]
        if len(filled) != 1 or (isinstance(output, (tuple, list)) and any(isinstance(o, Tensor) for o in output[1:])):
            raise _Undivided
        self.index, self.output = filled[0], output[0] if isinstance(output, (tuple, list)) else output
        self.rests = _Rests(own.layers[self.index], self.line)
        lent.layers = [*own.layers[: self.index], self.rests]
        return self.rest.of(given, self.shape, lent)

    def after(self, output: Any) -> Any:
        """Fill the cache, and return the output for all tokens, from that for the rests."""
        assert self.cache is not None
        keys, values = self.rests.whole
        self.cache.update(self._ordered(keys, 2), self._ordered(values, 2), self.index)
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        hidden = self._ordered(torch.cat([self.output[self.line.to(hidden.device)], hidden], dim=1), 1)
        return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden

    def _ordered(self, values: Float[Tensor, "row ..."], dim: int) -> Float[Tensor, "row ..."]:
        """Put the tokens of beginnings and rests, along a dimension, where they stand in their rows."""
        values = values.movedim(dim, 1)
        lines = torch.arange(len(values), device=values.device)[:, None]
        return values[lines, self.source.to(values.device)].movedim(1, dim)
