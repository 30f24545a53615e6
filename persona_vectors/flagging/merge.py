"""The last step of a flagging run: parts become one Parquet file with percentiles and flags."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from persona_vectors.data.files import atomic_path
from persona_vectors.data.samples import import_pyarrow
from persona_vectors.flagging.parts import FORMAT, HEADER, Flags, Summary, flag_batches, part, read_table
from persona_vectors.flagging.store import Baselines
from persona_vectors.vectors.directions import vector_keys
from persona_vectors.vectors.nulls import Spread, beaten, halves

_PLAIN = ("row", "turn", "id", "prompt_hash", "prompt_tokens", "answer_tokens", "baseline_tokens", "truncated")


def merge(
    folder: Path,
    out: Path,
    *,
    reading: str,
    plan: dict[str, Any],
    settings: dict[str, Any],
    reference: Path | None,
) -> Flags:
    """Write the finished file from its parts: percentiles need all differences, which are sorted on the disk."""
    pa, parquet = import_pyarrow()
    totals, baseline = dict(plan["counts"]), settings["baseline"]
    keys, controls = vector_keys(list(settings["vectors"]), settings["layers"]), settings["controls"]
    places, randoms = _places(len(settings["vectors"]), controls, settings["layers"])
    with closing(Baselines(folder / "baselines.sqlite")) as known:

        def parts() -> Iterator[dict[str, Any]]:
            return (_part_rows(folder, n, baseline, reading, known, places, randoms) for n in range(plan["chunks"]))

        own = [_Column(folder / f"sorted-{i}.f32") for i in range(len(keys))]
        totals["empty_baselines"] = 0
        spreads = {name: Spread() for name in randoms}
        for rows in parts():
            for name, spread in spreads.items():
                spread.add(rows[name])
            for column, values in zip(own, rows["difference"].T):
                column.add(values)
            lacks = np.isnan(rows["baseline"]).any(axis=1) & ~np.isnan(rows["projection"]).any(axis=1)
            totals["empty_baselines"] += int(lacks.sum()) if baseline not in ("none", "prompt_last") else 0
        ranks = own if reference is None else _reference_columns(folder, reference, keys)
        for column in {*own, *ranks}:
            column.sort()
        limits = [_limit(column, settings["threshold"], settings["percentile"]) for column in ranks]
        flagged = np.zeros(len(keys), int)
        for rows in parts():
            for i, limit in enumerate(limits):
                flagged[i] += 0 if limit is None else int((rows["difference"][:, i] >= limit).sum())
        nulls = [spreads[f"controls@{layer}"] for layer in settings["layers"] for _ in settings["vectors"]]
        summary = {key: own[i].summary(limits[i], int(flagged[i]), nulls[i]) for i, key in enumerate(keys)}
        header = {"format": FORMAT, "settings": settings, "digest": plan["digest"], "counts": totals}
        header["summary"] = {key: asdict(found) for key, found in summary.items()}
        metadata = {HEADER: json.dumps(header).encode()}
        schema = pa.schema(_fields(pa, keys, randoms, controls), metadata=metadata)
        with atomic_path(out) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
            for rows in parts():
                columns = _columns(rows, keys, ranks, limits)
                columns |= {name: list(rows[name]) for name in schema.names if name in randoms}
                writer.write_table(pa.table(columns, schema=schema))
            if not plan["chunks"]:
                writer.write_table(schema.empty_table())
    shutil.rmtree(folder)
    return Flags(out, settings, totals, summary)


def _places(vectors: int, controls: int, layers: Sequence[int]) -> tuple[list[int], dict[str, slice]]:
    """Return where the vectors' values are among all that were read, and where each layer's random directions' are."""
    width = vectors + controls
    places = [block * width + i for block in range(len(layers)) for i in range(vectors)]
    blocks = {f"controls@{layer}": block * width for block, layer in enumerate(layers)}
    return places, {name: slice(first + vectors, first + width) for name, first in blocks.items()}


def _fields(pa: Any, keys: Sequence[str], randoms: Iterable[str], controls: int) -> list[Any]:
    types = dict.fromkeys(_PLAIN, pa.int32()) | {"row": pa.int64(), "truncated": pa.bool_()}
    types |= {"id": pa.string(), "prompt_hash": pa.string()}
    for key in keys:
        types |= {f"{key}_{name}": pa.float32() for name in ("projection", "baseline", "difference", "percentile")}
        types[f"{key}_flagged"] = pa.bool_()
    types["flagged"] = pa.bool_()
    if controls:
        types |= dict.fromkeys(randoms, pa.list_(pa.float32(), controls))
    return [pa.field(name, kind) for name, kind in types.items()]


def _part_rows(
    folder: Path,
    number: int,
    baseline: str,
    reading: str,
    known: Baselines,
    places: Sequence[int],
    randoms: dict[str, slice],
) -> dict[str, Any]:
    """Return a part's rows with their baselines and differences, [row, key] in float32; nan where there is none.

    The random directions' differences are under the names of `randoms`, [row, direction].
    """
    rows = read_table(part(folder, "rows", number))
    whole = _values(rows, read_table(part(folder, "values", number)), baseline, reading, known)
    for name, where in randoms.items():
        rows[name] = whole["difference"][:, where]
    return rows | {name: values[:, list(places)] for name, values in whole.items()}


def _values(
    rows: dict[str, Any], read: dict[str, Any], baseline: str, reading: str, known: Baselines
) -> dict[str, np.ndarray]:
    """Return projections, baselines and differences, [row, all that was read]; the rows are told their tokens."""
    whole = {"projection": np.array(read["projection"], np.float32).reshape(len(rows["row"]), -1)}
    for name in ("prompt", "answer"):
        rows[f"{name}_tokens"] = [len(ids) for ids in rows[f"{name}_ids"]]
    rows["baseline_tokens"] = [None] * len(rows["row"])
    if baseline == "none":
        return whole | {"baseline": np.full_like(whole["projection"], np.nan), "difference": whole["projection"]}
    if baseline == "prompt_last":
        whole["baseline"] = np.array(read["prompt_last"], np.float32).reshape(len(rows["row"]), -1)
    else:
        found = [known.find(key, reading) for key in rows["key"]]
        assert all(item is not None for item in found)
        rows["baseline_tokens"] = [len(item[0]) for item in found if item is not None]
        whole["baseline"] = np.stack([item[1] for item in found if item is not None])
    return whole | {"difference": whole["projection"] - whole["baseline"]}


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

    def summary(self, threshold: float | None, flagged: int, null: "Spread") -> Summary:
        mean = self.sum / self.count if self.count else math.nan
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan
        enough = None
        if mean and not math.isnan(deviation):
            enough = max(2, math.ceil((1.96 * deviation / mean) ** 2))
        error = deviation / math.sqrt(self.count) if self.count else math.nan
        found, effects = Summary(mean, error, self.count, enough, threshold, flagged), null.effects
        if not len(effects) or not deviation:
            return found
        shares = beaten(mean / deviation, effects)
        band = max(float(np.quantile(np.abs(half), 0.95)) for half in halves(effects))
        return replace(found, beaten_isotropic=shares[0], beaten_covariance=shares[1], null=band * deviation)


def _limit(column: _Column, threshold: float | None, percentile: float | None) -> float | None:
    if percentile is None:
        return threshold
    return column.at(percentile) if column.count else None


def _reference_columns(folder: Path, reference: Path, keys: Sequence[str]) -> list[_Column]:
    columns = [_Column(folder / f"reference-{i}.f32") for i in range(len(keys))]
    for batch in flag_batches(reference, [f"{key}_difference" for key in keys]):
        for column, key in zip(columns, keys):
            column.add(np.array(batch[f"{key}_difference"], np.float32))
    return columns
