"""Writing files: whole or not at all, or appended to by one run at a time; and what Parquet needs."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from persona_vectors.data.errors import InputError

_writes = True


def only_first_writes() -> None:
    """Have this process write nothing from now on, unless it is the first of those that torchrun started.

    The others hold a shard of the same model and run the same program: what they would write is the same.
    """
    global _writes
    _writes = os.environ.get("RANK", "0") == "0"


def append(path: Path, text: str) -> None:
    """Add text to a file, and have it on the disk before returning."""
    if not _writes:
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have an error of the file system name the file that was to be written, not its folder or its temporary name."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): give another file") from None


@contextmanager
def writing(path: str | Path | None) -> Iterator[None]:
    """Keep other runs from writing the same file meanwhile; with None there is none.

    Raises InputError where one is writing it already.
    """
    if path is None or not _writes:
        yield
        return
    path = Path(path)
    mark = path.parent / f".{path.name}.lock"
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(mark)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"another run is writing {path}: wait for its end, or give another file") from None
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)
        lock.release()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` when the block ends without an error."""
    path = Path(path)
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(temporary)
        if _writes:
            os.chmod(temporary, 0o644)
            with _named(path):
                os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def import_pyarrow() -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet; raises InputError where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("this needs the pyarrow package: pip install 'persona-vectors-toolkit[data]'") from None
    return pyarrow, pyarrow.parquet
