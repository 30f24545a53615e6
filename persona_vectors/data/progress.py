"""Progress bars of long work, and the one switch that silences them."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

_state = {"shown": True}


def show_progress(shown: bool = True) -> None:
    """Show progress bars on long work, or with False none, as TQDM_DISABLE=1 in the environment does."""
    _state["shown"] = shown


def bar(items: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, initial: int = 0) -> Any:
    """Return a tqdm bar, over `items` or moved with `.update(n)`; what is done within a second shows none."""
    silenced = {} if _state["shown"] else {"disable": True}  # else tqdm looks at TQDM_DISABLE
    return tqdm(items, desc=desc, unit=unit, total=total, initial=initial, delay=1, leave=False, **silenced)
