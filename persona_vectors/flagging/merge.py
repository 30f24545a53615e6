"""The last step of a flagging run: parts become one Parquet file with percentiles and flags."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from persona_vectors.data.files import atomic_path, import_pyarrow
from persona_vectors.flagging.columns import Column
from persona_vectors.flagging.labelled import LabelledRows
from persona_vectors.flagging.nulls import best_layer
from persona_vectors.flagging.parts import FORMAT, HEADER, Flags, fixed, flag_batches, part, read_table
from persona_vectors.flagging.results import Best, Summary
from persona_vectors.flagging.store import Baselines
from persona_vectors.vectors.directions import vector_keys
from persona_vectors.vectors.nulls import Spread

_PLAIN = ("row", "turn", "id", "prompt_hash", "prompt_tokens", "answer_tokens", "baseline_tokens", "truncated")
_LABELS = ("label", "sentiment")


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

        own = [Column(folder / f"sorted-{i}.f32") for i in range(len(keys))]
        spreads = {name: Spread() for name in randoms}
        told = None
        if settings["labels"]:
            told = LabelledRows(folder, len(keys), randoms, controls, totals["labelled"])
        totals["empty_baselines"] = 0
        for rows in parts():
            for name, spread in spreads.items():
                spread.add(rows[name])
            for column, values in zip(own, rows["difference"].T):
                column.add(values)
            if told:
                told.add(rows)
            lacks = np.isnan(rows["baseline"]).any(axis=1) & ~np.isnan(rows["projection"]).any(axis=1)
            totals["empty_baselines"] += int(lacks.sum()) if baseline not in ("none", "prompt_last") else 0
        ranks = own if reference is None else _reference_columns(folder, reference, keys)
        for column in {*own, *ranks}:
            column.sort()
        limits = [_limit(column, settings["threshold"], settings["percentile"]) for column in ranks]
        effects = {name: spread.effects for name, spread in spreads.items()}
        summary, best = _results(keys, settings, own, limits, effects, told)
        header = {"format": FORMAT, "settings": settings, "digest": plan["digest"], "counts": totals}
        header["summary"] = {key: asdict(found) for key, found in summary.items()}
        header["best"] = {trait: {name: asdict(one) for name, one in scores.items()} for trait, scores in best.items()}
        metadata = {HEADER: json.dumps(header).encode()}
        schema = pa.schema(_fields(pa, keys, randoms, controls, labels=told is not None), metadata=metadata)
        with atomic_path(out) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
            for rows in parts():
                columns = _columns(rows, keys, ranks, limits)
                columns |= {name: fixed(rows[name]) for name in schema.names if name in randoms}
                columns |= {name: rows[name] for name in _LABELS if told}
                writer.write_table(pa.table(columns, schema=schema))
            if not plan["chunks"]:
                writer.write_table(schema.empty_table())
    shutil.rmtree(folder)
    return Flags(out, settings, totals, summary, best)


def _results(
    keys: Sequence[str],
    settings: dict[str, Any],
    own: Sequence[Column],
    limits: Sequence[float | None],
    effects: dict[str, np.ndarray],
    told: LabelledRows | None,
) -> tuple[dict[str, Summary], dict[str, dict[str, Best]]]:
    """Return each key's summary, and each vector's best layers; `effects` are those of a layer's random directions."""
    layers, traits = settings["layers"], list(settings["vectors"])
    names = [f"controls@{layer}" for layer in layers for _ in traits]
    areas = {name: told.random(name) for name in effects} if told else {}
    found = [column.summary(limit, effects[name]) for column, limit, name in zip(own, limits, names)]
    if told:
        labelled = told.summaries([areas[name] for name in names])
        found = [replace(one, labelled=label) for one, label in zip(found, labelled)]
    best: dict[str, dict[str, Best]] = {}
    for i, trait in enumerate(traits if len(layers) > 1 and settings["controls"] else []):
        mine = range(i, len(keys), len(traits))
        scores = {"effect": best_layer([own[k].effect for k in mine], effects, layers, 0.0)}
        if told:
            scores["auroc"] = best_layer([labelled[k].auroc.mean for k in mine], areas, layers, 0.5)
        best[trait] = {name: one for name, one in scores.items() if one is not None}
    return dict(zip(keys, found)), best


def _places(vectors: int, controls: int, layers: Sequence[int]) -> tuple[list[int], dict[str, slice]]:
    """Return where the vectors' values are among all that were read, and where each layer's random directions' are."""
    width = vectors + controls
    places = [block * width + i for block in range(len(layers)) for i in range(vectors)]
    blocks = {f"controls@{layer}": block * width for block, layer in enumerate(layers)}
    return places, {name: slice(first + vectors, first + width) for name, first in blocks.items()}


def _fields(pa: Any, keys: Sequence[str], randoms: Iterable[str], controls: int, *, labels: bool) -> list[Any]:
    types = dict.fromkeys(_PLAIN, pa.int32()) | {"row": pa.int64(), "truncated": pa.bool_()}
    types |= {"id": pa.string(), "prompt_hash": pa.string()}
    for key in keys:
        types |= {f"{key}_{name}": pa.float32() for name in ("projection", "baseline", "difference", "percentile")}
        types[f"{key}_flagged"] = pa.bool_()
    types["flagged"] = pa.bool_()
    if labels:
        types |= {"label": pa.bool_(), "sentiment": pa.float32()}
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
    whole = {"projection": read["projection"]}
    for name in ("prompt", "answer"):
        rows[f"{name}_tokens"] = [len(ids) for ids in rows[f"{name}_ids"]]
    rows["baseline_tokens"] = [None] * len(rows["row"])
    if baseline == "none":
        return whole | {"baseline": np.full_like(whole["projection"], np.nan), "difference": whole["projection"]}
    if baseline == "prompt_last":
        whole["baseline"] = read["prompt_last"]
    else:
        found = [known.find(key, reading) for key in rows["key"]]
        assert all(item is not None for item in found)
        rows["baseline_tokens"] = [len(item[0]) for item in found if item is not None]
        whole["baseline"] = np.stack([item[1] for item in found if item is not None])
    return whole | {"difference": whole["projection"] - whole["baseline"]}


def _columns(rows: dict[str, Any], keys: Sequence[str], ranks: Sequence[Column], limits: Sequence) -> dict[str, Any]:
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


def _limit(column: Column, threshold: float | None, percentile: float | None) -> float | None:
    if percentile is None:
        return threshold
    return column.at(percentile) if column.count else None


def _reference_columns(folder: Path, reference: Path, keys: Sequence[str]) -> list[Column]:
    columns = [Column(folder / f"reference-{i}.f32") for i in range(len(keys))]
    for batch in flag_batches(reference, [f"{key}_difference" for key in keys]):
        for column, key in zip(columns, keys):
            column.add(np.array(batch[f"{key}_difference"], np.float32))
    return columns
