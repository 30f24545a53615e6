"""Split a dataset by its flags, in its own format."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path, import_pyarrow
from persona_vectors.data.samples import is_array, read_records
from persona_vectors.flagging.parts import flag_batches, read_header


def split_dataset(
    data: str | Path,
    flags: str | Path,
    *,
    kept: str | Path,
    removed: str | Path | None = None,
    judge_above: float | None = None,
    split: str = "train",
) -> dict[str, int]:
    """Write a dataset without its flagged samples, in its own format; returns how many were kept, removed and left out.

    A sample is removed where it, or any answer in it, is `flagged`, or where its `judge` score, which `add_scores`
    writes, is at or above `judge_above`: the paper's best filter combines the two. Records that were no samples are in
    neither file. JSONL lines are copied byte for byte; a dataset from the Hub is written as JSONL or Parquet, as the
    name says.

    Raises InputError where the flags are another dataset's, hold no thresholds, or the formats differ.
    """
    header, flags, kept = read_header(Path(flags)), Path(flags), Path(kept)
    if all(found["threshold"] is None for found in header["summary"].values()):
        raise InputError(f"{flags} has no flags: run flag again with threshold=, percentile= or reference=")
    columns = ["row", "flagged"]
    if judge_above is not None:
        if "judge" not in import_pyarrow()[1].read_schema(flags).names:
            raise InputError(f"{flags} has no judge scores: add them with add_scores, or flag --judge")
        columns.append("judge")
    counts = {"kept": 0, "removed": 0, "left_out": 0}
    with ExitStack() as stack:
        outputs = {"kept": stack.enter_context(_writer(data, kept, split))}
        if removed is not None:
            outputs["removed"] = stack.enter_context(_writer(data, Path(removed), split))
        rows = _rows(flags, columns)
        following = next(rows, None)
        for number, record in enumerate(_raw_records(data, split)):
            if following is None or following["row"] != number:
                counts["left_out"] += 1
                continue
            bad = following["flagged"]
            if judge_above is not None:
                bad = bad or (following["judge"] is not None and following["judge"] >= judge_above)
            side = "removed" if bad else "kept"
            counts[side] += 1
            if side in outputs:
                outputs[side](number, record)
            following = next(rows, None)
        if following is not None or counts["left_out"] != header["counts"]["skipped"]:
            raise InputError(f"{flags} was made from other data than {data}: flag this dataset first")
    return counts


def _rows(flags: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one row a record: the worst of its answers."""
    each = (dict(zip(batch, values)) for batch in flag_batches(flags, columns) for values in zip(*batch.values()))
    for _, answers in groupby(each, key=lambda row: row["row"]):
        rows = list(answers)
        known = {name: [row[name] for row in rows if row[name] is not None] for name in columns}
        yield {name: max(values, default=None) for name, values in known.items()}


def _raw_records(data: str | Path, split: str) -> Iterator[Any]:
    """Yield records as they are to be written back: JSONL lines as bytes."""
    path = Path(data)
    if path.suffix in (".jsonl", ".ndjson", ".json") and path.is_file() and not is_array(path):
        with path.open("rb") as file:
            yield from (line if line.endswith(b"\n") else line + b"\n" for line in file if line.strip())
    else:
        yield from (record for _, record in read_records(data, split=split))


@contextmanager
def _writer(data: str | Path, path: Path, split: str) -> Iterator[Any]:
    """Yield a function that appends a record to `path`, which appears when all is written."""
    source, kind = Path(data), path.suffix
    if source.is_dir():
        with _folder_writer(source, path, split) as write:
            yield write
        return
    if source.is_file() and kind != source.suffix:
        raise InputError(f"{path.name} is not in the format of {source.name}: give a name that ends in {source.suffix}")
    if kind not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"):
        raise InputError(f"{path.name} has no known format: give a name that ends in .jsonl or .parquet")
    with atomic_path(path) as temporary:
        if kind == ".parquet":
            with _parquet_writer(source, temporary) as write:
                yield write
        elif kind in (".csv", ".tsv"):
            with source.open(newline="", encoding="utf-8-sig") as file:
                names = next(csv.reader(file, delimiter="," if kind == ".csv" else "\t"))
            with temporary.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, names, delimiter="," if kind == ".csv" else "\t")
                table.writeheader()
                yield lambda _, record: table.writerow(record)
        else:
            array = source.is_file() and is_array(source)
            with temporary.open("wb") as file:
                yield _json_array(file) if array else lambda _, record: file.write(_line(record))
                if array:
                    file.write(b"\n]\n" if file.tell() else b"[]\n")


def _line(record: Any) -> bytes:
    return record if isinstance(record, bytes) else (json.dumps(record, ensure_ascii=False) + "\n").encode()


def _json_array(file: Any) -> Any:
    def write(_: int, record: Any) -> None:
        file.write(b",\n" if file.tell() else b"[\n")
        file.write(json.dumps(record, ensure_ascii=False).encode())

    return write


@contextmanager
def _parquet_writer(source: Path, path: Path) -> Iterator[Any]:
    """Write batches of records with the schema of the source, or, from the Hub, of the first batch."""
    pa, parquet = import_pyarrow()
    schema = parquet.read_schema(source) if source.is_file() else None
    waiting: list[Any] = []
    with ExitStack() as stack:
        writer: list[Any] = []

        def flush() -> None:
            table = pa.Table.from_pylist(waiting, schema=writer[0].schema if writer else schema)
            if not writer:
                writer.append(stack.enter_context(parquet.ParquetWriter(path, table.schema)))
            writer[0].write_table(table)
            waiting.clear()

        def write(_: int, record: Any) -> None:
            waiting.append(record)
            if len(waiting) == 4096:
                flush()

        yield write
        if waiting or not writer:
            flush()


@contextmanager
def _folder_writer(source: Path, path: Path, split: str) -> Iterator[Any]:
    """Write a dataset folder: the rows are chosen by number, so that nothing is converted."""
    from datasets import DatasetDict, load_from_disk

    if path.exists():
        raise InputError(f"{path} exists already: give a new folder")
    loaded = load_from_disk(str(source))
    chosen: list[int] = []
    yield lambda number, _: chosen.append(number)
    dataset = loaded[split] if isinstance(loaded, DatasetDict) else loaded
    dataset.select(chosen).save_to_disk(str(path))
