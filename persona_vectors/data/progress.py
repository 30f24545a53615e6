"""Progress bars of long work, and the one switch that silences them."""

import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

_state = {"shown": True}
_open: list[Any] = []
_outer: ContextVar[Any] = ContextVar("outer", default=None)
_silent: ContextVar[bool] = ContextVar("silent", default=False)


def show_progress(shown: bool = True) -> None:
    """Show progress bars on long work, or with False none, as TQDM_DISABLE=1 in the environment does."""
    _state["shown"] = shown


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no bars in this thread: beside those of another one they would flicker."""
    before = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(before)


@contextmanager
def counted_in(outer: Any) -> Iterator[None]:
    """Have the bars that are opened inside, in this thread, move `outer` by what they are moved, and not be shown."""
    before = _outer.set(outer)
    try:
        yield
    finally:
        _outer.reset(before)


def bar(items: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, initial: int = 0) -> Any:
    """Return a tqdm bar, over `items` or moved with `.update(n)`; what is done within a second shows none."""
    outer = _outer.get()
    if outer is not None:
        made = tqdm(items, total=total, disable=True)
        made.update = outer.update
        return made
    silenced = {} if _state["shown"] and not _silent.get() else {"disable": True}  # else tqdm looks at TQDM_DISABLE
    options = {"smoothing": 0, "delay": 1, "leave": False} | silenced  # a batch ends at once: the mean rate tells most
    made = tqdm(items, desc=desc, unit=unit, total=total, initial=initial, **options)
    _open[:] = [known for known in _open if known() is not None and not known().disable] + [weakref.ref(made)]
    return made


def pulse(text: str, *, on: Any = None) -> None:
    """Say on the innermost open bar, or another one, how far its next step is: twice a second, once it is shown."""
    bars = [known() for known in reversed(_open)] if on is None else [on]
    shown = next((bar for bar in bars if bar is not None and not bar.disable), None)
    if shown is not None and not _silent.get():
        now = time.time()
        if now - shown.start_t >= shown.delay and now - shown.last_print_t >= 0.5:
            shown.last_print_t = now
            shown.set_postfix_str(text)
