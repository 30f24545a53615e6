"""Warnings of other libraries that nobody here can act on."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def as_named_today() -> Iterator[None]:
    """Leave out transformers' warnings of a name that trl and peft still use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing` is deprecated", FutureWarning)
        yield
