"""Judging beside generation: a remote judge scores a batch while the next ones are generated."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import closing, nullcontext
from functools import partial
from typing import Any, TypeVar

from persona_vectors.data.progress import bar, without_bars

AHEAD = 4
"""How many batches wait for their scores at most, before generation waits too."""
B = TypeVar("B")
S = TypeVar("S")


def in_background(work: Callable[[], S]) -> Future[S]:
    """Start work in a thread, which shows no progress bars; a program that is interrupted does not wait for it."""
    future: Future[S] = Future()

    def run() -> None:
        try:
            with without_bars():
                future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def score_batches(batches: Iterable[B], work: Callable[[B], S], keep: Callable[[B, S], Any], *, remote: bool) -> None:
    """Call `keep(batch, work(batch))` for every batch, in order.

    With `remote` each batch's work runs in a thread of its own while the next batches are made, and what is ready is
    kept in this thread between them. An error and an interruption end it without waiting for work that is under way;
    batches that are ready by then are kept, up to the first that is not. Batches that are a generator are closed.
    """
    with closing(batches) if isinstance(batches, Generator) else nullcontext():
        _score_batches(batches, work, keep, remote=remote)


def _score_batches(batches: Iterable[B], work: Callable[[B], S], keep: Callable[[B, S], Any], *, remote: bool) -> None:
    if not remote:
        for batch in batches:
            keep(batch, work(batch))
        return
    waiting: deque[tuple[B, Future[S]]] = deque()

    def keep_first() -> None:
        scores = waiting[0][1].result()
        try:
            keep(waiting.popleft()[0], scores)
        except BaseException:
            waiting.clear()  # nothing is kept after a batch that was not
            raise

    try:
        for batch in batches:
            waiting.append((batch, in_background(partial(work, batch))))
            while waiting and (waiting[0][1].done() or len(waiting) > AHEAD):
                keep_first()
        for _ in bar(range(len(waiting)), desc="judging", unit="batch"):
            keep_first()
    finally:
        while waiting and waiting[0][1].done() and not waiting[0][1].exception():
            keep_first()
