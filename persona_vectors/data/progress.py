"""Progress bars of long work, and the one switch that silences them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

_state = {"shown": True}
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


def bar(items: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, initial: int = 0) -> Any:
    """Return a tqdm bar, over `items` or moved with `.update(n)`; what is done within a second shows none."""
    silenced = {} if _state["shown"] and not _silent.get() else {"disable": True}  # else tqdm looks at TQDM_DISABLE
    return tqdm(items, desc=desc, unit=unit, total=total, initial=initial, delay=1, leave=False, **silenced)
