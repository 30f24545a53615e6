"""The files of a flagging run: parts that a killed run continues, baselines kept by prompt, and the merged Parquet."""

import json
import math
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persona_vectors.data.files import InputError, atomic_path
from persona_vectors.data.samples import import_pyarrow

FORMAT = 1
HEADER = b"persona_vectors_flags"


@dataclass(frozen=True)
class Summary:
    """One vector's projection difference over a dataset (paper, section 6)."""

    mean: float
    standard_error: float
    samples: int
    """How many samples have a difference: those with an empty answer have none."""
    enough: int | None
    """How many samples it takes for the mean's 95 % interval to leave out zero; None where no number does."""
    threshold: float | None
    """The difference from which a sample is flagged."""
    flagged: int


@dataclass(frozen=True)
class Flags:
    """What a flagging run found; the rows are in the Parquet file `path`."""

    path: Path
    settings: dict[str, Any]
    counts: dict[str, int]
    """samples, truncated, empty, empty_baselines, and skipped (records that are no samples)."""
    summary: dict[str, Summary]

    def __repr__(self) -> str:
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in self.counts.items())
        lines = [f"Flags({self.path}: {counts})"]
        for key, found in self.summary.items():
            enough = "no number of samples" if found.enough is None else f"{found.enough:,} samples"
            flagged = "" if found.threshold is None else f", {found.flagged:,} at or above {found.threshold:+.3f}"
            error = 1.96 * found.standard_error
            lines.append(f"  {key}: {found.mean:+.3f} +- {error:.3f} (95 %; {enough} show its sign){flagged}")
        return "\n".join(lines)


def load_flags(path: str | Path) -> Flags:
    """Read what a finished flags file says of itself; raises InputError where it is none of ours."""
    header, path = read_header(Path(path)), Path(path)
    return Flags(
        path, header["settings"], header["counts"], {key: Summary(**found) for key, found in header["summary"].items()}
    )


def is_flags(source: Any) -> bool:
    """Say whether a source of samples is instead a flags file."""
    if not isinstance(source, (str, Path)) or Path(source).suffix != ".parquet" or not Path(source).is_file():
        return False
    return HEADER in (import_pyarrow()[1].read_schema(source).metadata or {})


def read_header(path: Path) -> dict[str, Any]:
    pa, parquet = import_pyarrow()
    if not path.is_file():
        raise InputError(f"no flags file {path}: make one with flag")
    try:
        header = json.loads((parquet.read_schema(path).metadata or {})[HEADER])
    except (KeyError, ValueError, pa.ArrowInvalid):
        raise InputError(f"{path} was not written by flag: give another path, or remove it") from None
    if header["format"] != FORMAT:
        raise InputError(f"{path} has format version {header['format']}, and this release reads {FORMAT}: flag again")
    return header


def check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise InputError, naming the difference, where files were made with other settings."""
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{path} was made with {name}={found.get(name)!r}, not {wanted.get(name)!r}: "
                "give the same settings, or another file"
            )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write a part, whole or not at all."""
    pa, parquet = import_pyarrow()
    with atomic_path(path) as temporary:
        parquet.write_table(pa.table(columns), temporary)


def read_table(path: Path) -> dict[str, Any]:
    """Return a part's columns as lists; fixed-size lists as arrays [row, width]."""
    _, parquet = import_pyarrow()
    return parquet.read_table(path).to_pydict()


def part(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:07d}.parquet"


class Baselines:
    """Base answers and their projections, in an SQLite file, by prompt: what was made once is not made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.database = sqlite3.connect(path, timeout=60)
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS baselines (key TEXT, reading TEXT, ids BLOB, readings BLOB,"
                " PRIMARY KEY (key, reading)) WITHOUT ROWID"
            )
            self.database.execute("CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY) WITHOUT ROWID")
        except sqlite3.Error as error:
            raise InputError(f"cannot use the baseline cache {path} ({error}): remove it, or give another") from None

    def is_new(self, key: str) -> bool:
        """Say whether a key is asked about for the first time."""
        return self.database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1

    def answer(self, key: str) -> list[int] | None:
        """Return the tokens of the answer to a prompt, whatever was read in it."""
        row = self.database.execute("SELECT ids FROM baselines WHERE key = ? LIMIT 1", (key,)).fetchone()
        return None if row is None else np.frombuffer(row[0], np.int32).tolist()

    def find(self, key: str, reading: str) -> tuple[list[int], np.ndarray] | None:
        """Return an answer's tokens and its projections [key]."""
        query = "SELECT ids, readings FROM baselines WHERE key = ? AND reading = ?"
        row = self.database.execute(query, (key, reading)).fetchone()
        return None if row is None else (np.frombuffer(row[0], np.int32).tolist(), np.frombuffer(row[1], np.float32))

    def add(self, reading: str, keys: Iterable[str], ids: Iterable[Sequence[int]], values: Iterable[Any]) -> None:
        """Keep answers and their projections, all of them or none."""
        rows = [
            (key, reading, np.array(tokens, np.int32).tobytes(), np.array(value, np.float32).tobytes())
            for key, tokens, value in zip(keys, ids, values)
        ]
        try:
            with self.database:
                self.database.executemany("INSERT OR REPLACE INTO baselines VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise InputError(f"cannot write the baseline cache {self.path} ({error}): make room for it") from None

    def close(self) -> None:
        self.database.close()


def merge(
    folder: Path,
    out: Path,
    *,
    keys: Sequence[str],
    reading: str,
    plan: dict[str, Any],
    settings: dict[str, Any],
    reference: Path | None,
) -> Flags:
    """Write the finished file from its parts: percentiles need all differences, which are sorted on the disk."""
    pa, parquet = import_pyarrow()
    totals, baseline, threshold = dict(plan["counts"]), settings["baseline"], settings["threshold"]
    with closing(Baselines(folder / "baselines.sqlite")) as known:

        def parts() -> Iterator[dict[str, Any]]:
            return (_part_rows(folder, n, baseline, reading, known, len(keys)) for n in range(plan["chunks"]))

        own = [_Column(folder / f"sorted-{i}.f32") for i in range(len(keys))]
        totals["empty_baselines"] = 0
        for rows in parts():
            for column, values in zip(own, rows["difference"].T):
                column.add(values)
            lacks = np.isnan(rows["baseline"]).any(axis=1) & ~np.isnan(rows["projection"]).any(axis=1)
            totals["empty_baselines"] += int(lacks.sum()) if baseline not in ("none", "prompt_last") else 0
        ranks = own if reference is None else _reference_columns(folder, reference, keys)
        for column in {*own, *ranks}:
            column.sort()
        limits = [_limit(column, threshold) for column in ranks]
        flagged = np.zeros(len(keys), int)
        for rows in parts():
            for i, limit in enumerate(limits):
                flagged[i] += 0 if limit is None else int((rows["difference"][:, i] >= limit).sum())
        summary = {key: own[i].summary(limits[i], int(flagged[i])) for i, key in enumerate(keys)}
        header = {"format": FORMAT, "settings": settings, "digest": plan["digest"], "counts": totals}
        header["summary"] = {key: asdict(found) for key, found in summary.items()}
        metadata = {HEADER: json.dumps(header).encode()}
        schema = pa.schema(_fields(pa, keys), metadata=metadata)
        with atomic_path(out) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
            for rows in parts():
                writer.write_table(pa.table(_columns(rows, keys, ranks, limits), schema=schema))
            if not plan["chunks"]:
                writer.write_table(schema.empty_table())
    shutil.rmtree(folder)
    return Flags(out, settings, totals, summary)


_PLAIN = ("row", "id", "prompt_hash", "prompt_tokens", "answer_tokens", "baseline_tokens", "truncated")


def _fields(pa: Any, keys: Sequence[str]) -> list[Any]:
    types = dict.fromkeys(_PLAIN, pa.int32()) | {"row": pa.int64(), "truncated": pa.bool_()}
    types |= {"id": pa.string(), "prompt_hash": pa.string()}
    for key in keys:
        types |= {f"{key}_{name}": pa.float32() for name in ("projection", "baseline", "difference", "percentile")}
        types[f"{key}_flagged"] = pa.bool_()
    return [pa.field(name, kind) for name, kind in (types | {"flagged": pa.bool_()}).items()]


def _part_rows(folder: Path, number: int, baseline: str, reading: str, known: Baselines, width: int) -> dict[str, Any]:
    """Return a part's rows with their baselines and differences, [row, key] in float32; nan where there is none."""
    rows = read_table(part(folder, "rows", number))
    read = read_table(part(folder, "values", number))
    rows["projection"] = np.array(read["projection"], np.float32).reshape(-1, width)
    for name in ("prompt", "answer"):
        rows[f"{name}_tokens"] = [len(ids) for ids in rows[f"{name}_ids"]]
    rows["baseline_tokens"] = [None] * len(rows["row"])
    if baseline == "none":
        rows["baseline"] = np.full_like(rows["projection"], np.nan)
        rows["difference"] = rows["projection"]
        return rows
    if baseline == "prompt_last":
        rows["baseline"] = np.array(read["prompt_last"], np.float32).reshape(-1, width)
    else:
        found = [known.find(key, reading) for key in rows["key"]]
        assert all(item is not None for item in found)
        rows["baseline_tokens"] = [len(item[0]) for item in found if item is not None]
        rows["baseline"] = np.stack([item[1] for item in found if item is not None])
    rows["difference"] = rows["projection"] - rows["baseline"]
    return rows


def _columns(rows: dict[str, Any], keys: Sequence[str], ranks: "Sequence[_Column]", limits: Sequence) -> dict[str, Any]:
    columns = {name: rows[name] for name in _PLAIN}
    either: list[bool | None] = [None] * len(rows["row"])
    for i, key in enumerate(keys):
        difference = rows["difference"][:, i]
        flags = [None] * len(difference) if limits[i] is None else [bool(d >= limits[i]) for d in difference]
        if limits[i] is not None:
            either = [bool(a) or b for a, b in zip(either, flags)]
        named = {name: rows[name][:, i] for name in ("projection", "baseline", "difference")}
        named["percentile"] = ranks[i].percentiles(difference)
        columns |= {f"{key}_{name}": _nullable(values) for name, values in named.items()}
        columns[f"{key}_flagged"] = flags
    return columns | {"flagged": either}


def _nullable(values: np.ndarray) -> Any:
    return import_pyarrow()[0].array(values, mask=np.isnan(values))


class _Column:
    """Differences of one vector: running sums in memory, the values in a file that is sorted in place."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self.sum, self.squares = path, 0, 0.0, 0.0
        path.unlink(missing_ok=True)
        path.touch()

    def add(self, values: np.ndarray) -> None:
        wide = values[~np.isnan(values)].astype(np.float64)
        before = self.sum / self.count if self.count else 0.0
        self.count += len(wide)
        self.sum += float(wide.sum())
        after = self.sum / self.count if self.count else 0.0
        # the sum of squared deviations, updated by whole parts: exact where a sum of squares would cancel
        self.squares += float(((wide - after) ** 2).sum()) + (self.count - len(wide)) * (after - before) ** 2
        with self.path.open("ab") as file:
            file.write(wide.astype(np.float32).tobytes())

    def sort(self) -> None:
        if self.count:
            values = np.memmap(self.path, np.float32, mode="r+")
            values.sort()
            values.flush()
        self.values = np.memmap(self.path, np.float32, mode="r") if self.count else np.zeros(0, np.float32)

    def percentiles(self, values: np.ndarray) -> np.ndarray:
        """Return the share of the column below each value, ties counted half, in percent."""
        if not self.count:
            return np.full(len(values), np.nan, np.float32)
        below, upto = (np.searchsorted(self.values, values, side=side) for side in ("left", "right"))
        return np.where(np.isnan(values), np.nan, 50 * (below + upto) / self.count).astype(np.float32)

    def at(self, percentile: float) -> float:
        place = percentile / 100 * (self.count - 1)
        low, high = self.values[math.floor(place)], self.values[math.ceil(place)]
        return float(low + (high - low) * (place - math.floor(place)))

    def summary(self, threshold: float | None, flagged: int) -> Summary:
        mean = self.sum / self.count if self.count else math.nan
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan
        enough = None
        if mean and not math.isnan(deviation):
            enough = max(2, math.ceil((1.96 * deviation / mean) ** 2))
        error = deviation / math.sqrt(self.count) if self.count else math.nan
        return Summary(mean, error, self.count, enough, threshold, flagged)


def _limit(column: _Column, threshold: float | str | None) -> float | None:
    if threshold is None or not isinstance(threshold, str):
        return None if threshold is None else float(threshold)
    return column.at(float(threshold[1:])) if column.count else None


def _reference_columns(folder: Path, reference: Path, keys: Sequence[str]) -> list[_Column]:
    columns = [_Column(folder / f"reference-{i}.f32") for i in range(len(keys))]
    for batch in flag_batches(reference, [f"{key}_difference" for key in keys]):
        for column, key in zip(columns, keys):
            column.add(np.array(batch[f"{key}_difference"], np.float32))
    return columns


def flag_batches(path: Path, columns: Sequence[str]) -> Iterator[dict[str, list]]:
    """Yield a flags file's rows in batches, as lists by column."""
    _, parquet = import_pyarrow()
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=4096, columns=list(columns)):
            yield batch.to_pydict()
