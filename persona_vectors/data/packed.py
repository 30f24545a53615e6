"""Data files as they are and compressed: d.jsonl, d.jsonl.gz and d.jsonl.zst are read and written alike."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import import_pyarrow

PACKED = (".gz", ".zst")


def data_suffix(path: str | Path) -> str:
    """Return what a file's name ends in under its compression, in lower case: ".jsonl" of "d.jsonl.gz"."""
    path = Path(path)
    return Path(path.stem).suffix.lower() if path.suffix.lower() in PACKED else path.suffix.lower()


@contextmanager
def open_data(path: str | Path, mode: str = "rb") -> Iterator[Any]:
    """Open a data file to read ("rb") or write ("wb") its bytes, compressed as its name says.

    Raises InputError for a compressed file that is cut short or is none, and without pyarrow for a .zst one.
    """
    path = Path(path)
    if path.suffix.lower() not in PACKED:
        with path.open(mode) as file:
            yield file
        return
    try:
        with ExitStack() as stack:
            if path.suffix.lower() == ".gz":
                plain = stack.enter_context(path.open(mode))
                yield stack.enter_context(gzip.GzipFile("", mode, fileobj=plain, mtime=0))
            elif mode == "rb":
                stream = stack.enter_context(import_pyarrow()[0].input_stream(str(path), compression="zstd"))
                yield stack.enter_context(io.BufferedReader(stream))
            else:
                yield stack.enter_context(import_pyarrow()[0].output_stream(str(path), compression="zstd"))
    except (EOFError, OSError, zlib.error) as error:
        if mode == "wb":
            raise
        raise InputError(f"{path} is no whole {path.suffix[1:]} file ({error}): compress it again") from None
