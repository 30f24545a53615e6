"""Batches that fit into memory: sized by what is free, and halved where it runs out all the same."""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model
from persona_vectors.model.wrappers import unwrap

_known: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()
"""How many tokens a batch has at most, by model and kind of work, since memory ran out."""


class Attempt:
    """Work in a `with` that may be too much for the memory: `failed` says so afterwards, and nothing is raised."""

    failed = False

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: TracebackType | None) -> bool:
        self.failed = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
        )
        return self.failed


class Budget:
    """How many tokens a batch of one kind of work has at most: fewer in this process once memory has run out."""

    def __init__(self, model: Model, work: str, tokens: int, *, width: int | None = None) -> None:
        self.work, self.given, self.width = work, tokens, width
        self.known = _known.setdefault(unwrap(model), {})

    @property
    def tokens(self) -> int:
        """The most for now."""
        return min(self.given, self.known.get(self.work, self.given))

    def batches(self, rows: Sequence[Sequence[int]], extra: int = 0) -> Iterator[tuple[list[int], Attempt]]:
        """Yield batches of indices, longest rows first, with `extra` tokens a row; run each one in its attempt.

        Where that failed its rows come again, in batches of half its size, for which there is memory once the caller
        has let go of what the failed attempt made. Raises InputError where one row alone is too much.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            length = len(rows[order[0]]) + extra
            count = max(1, self.tokens // max(length, 1))
            batch, attempt = order[: min(count, self.width or count)], Attempt()
            yield batch, attempt
            if not attempt.failed:
                order = order[len(batch) :]
            elif len(batch) > 1:
                self.known[self.work] = len(batch) * length // 2
            else:
                raise InputError(
                    f"memory ran out in a batch of one row of {length} tokens: give shorter texts, a smaller "
                    "max_new_tokens, a smaller or quantised model, or a device with more memory"
                )
