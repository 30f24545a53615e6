"""Screening: split a dataset by its flags, add a judge's opinion, and say which of two datasets moves a trait more."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persona_vectors.data.files import InputError, atomic_path
from persona_vectors.data.samples import Sample, Source, import_pyarrow, is_array, read_records, read_samples
from persona_vectors.evaluation.answers import Interval
from persona_vectors.evaluation.judge import Answer, Judge, score
from persona_vectors.flagging.parts import flag_batches, read_header

SUBSAMPLES = 1000


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

    A sample is removed where it is `flagged`, or where its `judge` score, which `add_scores` writes, is at or above
    `judge_above`: the paper's best filter combines the two. Records that were no samples are in neither file.
    JSONL lines are copied byte for byte; a dataset from the Hub is written as JSONL or Parquet, as the name says.

    Raises InputError where the flags are another dataset's, hold no thresholds, or the formats differ.
    """
    header, flags, kept = read_header(Path(flags)), Path(flags), Path(kept)
    if header["settings"]["threshold"] is None:
        raise InputError(f"{flags} has no flags: run flag again with threshold= or reference=")
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
    for batch in flag_batches(flags, columns):
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


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


def add_scores(
    samples: Source,
    flags: str | Path,
    judge: Judge,
    rubric: str,
    *,
    columns: tuple[str, str] | None = None,
    split: str = "train",
    batch: int = 256,
) -> None:
    """Write a judge's score of each sample, 0 to 100, into the flags file, as the column `judge`.

    `rubric` is a trait's `eval_prompt`; the question is the last message before the answer. The file is replaced when
    all is judged; a judge that keeps its replies, as OpenAIJudge does, pays for none twice.
    """
    pa, parquet = import_pyarrow()
    flags = Path(flags)
    read_header(flags)
    usable = (sample for sample in read_samples(samples, columns=columns, split=split) if isinstance(sample, Sample))
    with parquet.ParquetFile(flags) as file, atomic_path(flags) as temporary:
        schema = file.schema_arrow
        if "judge" in schema.names:
            schema = schema.remove(schema.get_field_index("judge"))
        with parquet.ParquetWriter(temporary, schema.append(pa.field("judge", pa.float32()))) as writer:
            for rows in file.iter_batches(batch_size=batch, columns=schema.names):
                wanted = rows.column("row").to_pylist()
                found = {sample.row: sample for sample in _until(usable, wanted[-1])}
                if any(row not in found for row in wanted):
                    raise InputError(f"{flags} was made from other samples than these: give the same data")
                answers = [Answer(found[row].prompt[-1]["content"], found[row].answer) for row in wanted]
                scores = pa.array(score(judge, answers, rubric), pa.float32())
                writer.write_table(pa.Table.from_batches([rows]).append_column("judge", scores))


def _until(samples: Iterator[Sample], row: int) -> Iterator[Sample]:
    for sample in samples:
        yield sample
        if sample.row >= row:
            return


@dataclass(frozen=True)
class Comparison:
    """One vector's mean projection difference in two datasets, and which of them will move the trait more."""

    first: Interval
    second: Interval
    gap: Interval
    """First minus second, with its 95 % interval."""
    enough: int | None
    """How many samples of each show the same sign of the gap in 95 % of 1,000 random subsamples; None: no number
    up to the smaller dataset's."""

    def __str__(self) -> str:
        if self.gap.low <= 0 <= self.gap.high:
            verdict = "no telling which moves the trait more"
        else:
            verdict = f"the {'first' if self.gap.mean > 0 else 'second'} will move the trait more"
        enough = "" if self.enough is None else f"; {self.enough} samples of each suffice"
        return f"{self.first} and {self.second}, gap {self.gap}: {verdict}{enough}"


def compare_datasets(first: str | Path, second: str | Path, *, seed: int = 0) -> dict[str, Comparison]:
    """Compare two flags files, vector by vector, with 95 % intervals clustered by prompt.

    Raises InputError where they were made with other models, vectors, layers or baselines.
    """
    paths = [Path(first), Path(second)]
    headers = [read_header(path) for path in paths]
    for name in ("weights", "vectors", "layers", "baseline", "max_new_tokens"):
        mine, theirs = (header["settings"][name] for header in headers)
        if mine != theirs:
            raise InputError(f"{first} has {name}={mine!r} and {second} {theirs!r}: flag both with the same settings")
    compared = {}
    for key in headers[0]["summary"]:
        columns = [_differences(path, key) for path in paths]
        (a, error_a), (b, error_b) = (_clustered(values, prompts) for values, prompts in columns)
        gap = _interval(a - b, float(np.hypot(error_a, error_b)))
        enough = _enough([values for values, _ in columns], a - b, np.random.default_rng(seed))
        compared[key] = Comparison(_interval(a, error_a), _interval(b, error_b), gap, enough)
    return compared


def _differences(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a vector's differences, and a number for each one's prompt."""
    values, prompts = [], []
    for batch in flag_batches(path, ["prompt_hash", f"{key}_difference"]):
        values.append(np.array(batch[f"{key}_difference"], np.float32))
        prompts.append(np.array([int(text, 16) for text in batch["prompt_hash"]], np.uint64))
    found, asked = (np.concatenate([*parts, empty]) for parts, empty in ((values, []), (prompts, [])))
    kept = ~np.isnan(found)
    if kept.sum() < 2:
        raise InputError(f"{path} has {kept.sum()} samples with a difference: give two or more")
    return found[kept], np.unique(asked[kept], return_inverse=True)[1]


def _clustered(values: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """Return the mean, and its standard error where samples of one prompt count as one cluster."""
    mean = float(values.mean(dtype=np.float64))
    sums = np.bincount(prompts, values - mean)
    scale = len(sums) / (len(sums) - 1) if len(sums) > 1 else np.nan
    return mean, float(np.sqrt(scale * (sums**2).sum()) / len(values))


def _interval(mean: float, error: float) -> Interval:
    return Interval(mean, mean - 1.96 * error, mean + 1.96 * error)


def _enough(columns: Sequence[np.ndarray], gap: float, rng: np.random.Generator) -> int | None:
    size, smallest = 2, min(map(len, columns))
    while size <= smallest:
        means = [rng.choice(values, (SUBSAMPLES, size)).mean(axis=1) for values in columns]
        if (np.sign(means[0] - means[1]) == np.sign(gap)).mean() >= 0.95:
            return size
        size = max(size + 1, round(size * 1.3))
    return None
