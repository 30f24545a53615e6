"""The report on a flagged dataset: one HTML file with numbers, histograms, and samples whose tokens are coloured."""

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.formats import said
from persona_vectors.data.samples import Sample, Source, read_samples
from persona_vectors.flagging.parts import Flags, flag_batches
from persona_vectors.model.blocks import Model
from persona_vectors.model.identity import fingerprint
from persona_vectors.model.prompts import encode_answer, finished_turn, fit
from persona_vectors.monitoring.heatmaps import robust_span, token_texts
from persona_vectors.monitoring.projection import token_projections
from persona_vectors.vectors.directions import unit_directions, vector_list
from persona_vectors.vectors.vector import PersonaVector

BARS = 40


Place = tuple[int, int]
"""A record's row, and which of its answers."""


def write_report(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    data: Source,
    vectors: PersonaVector | Sequence[PersonaVector],
    *,
    flags: str | Path,
    out: str | Path,
    each: int | None = None,
    columns: tuple[str, str] | None = None,
    split: str = "train",
    seed: int = 0,
) -> None:
    """Write a page about a flags file that needs nothing else: `each` top and bottom samples a vector, and random ones.

    The samples shown are read from the dataset again, and projected token by token: 50 of each unless it is given, but
    10 or more where that would be over a quarter of the dataset. All their text is escaped.

    Raises InputError where the flags were made with another model or other vectors, or `data` cannot be read twice.
    """
    found = Flags.load(flags)
    chosen = vector_list(vectors)
    if found.settings["weights"] != fingerprint(model) or list(found.settings["vectors"]) != [v.trait for v in chosen]:
        names = ", ".join(found.settings["vectors"])
        raise InputError(f"{flags} was made with model {found.settings['model']} and {names}: give the same ones")
    if iter(data) is data if not isinstance(data, (str, Path)) else False:
        raise InputError("these samples can be read only once: give a file or a list, or write them to one")
    if each is None:
        each = min(50, max(10, found.counts["samples"] // (4 * (2 * len(found.summary) + 1))))
    picked = pick_rows(found, each=each, seed=seed)
    last = max(picked, default=(-1, 0))
    units = unit_directions(model, chosen, found.settings["layers"])
    rows, shown = [], []
    for sample in read_samples(data, columns=columns, split=split, turns=found.settings["turns"]):
        if isinstance(sample, Sample) and (sample.row, sample.turn) in picked:
            whole = encode_answer(tokenizer, *finished_turn(tokenizer, sample.talk, len(sample.prompt)))
            rows.append(fit(whole, found.settings["max_length"], (found.settings["max_new_tokens"] or -1) + 1))
            prompt = "\n".join(f"{m['role']}: {said(m)}" for m in sample.prompt)
            shown.append({"id": sample.id, "prompt": prompt, **picked[sample.row, sample.turn]})
        if isinstance(sample, Sample) and (sample.row, sample.turn) >= last:
            break
    values = token_projections(model, rows, units, batch_tokens=found.settings["batch_tokens"])
    for entry, (prompt_ids, answer_ids), read in zip(shown, rows, values):
        entry["tokens"] = token_texts(tokenizer, answer_ids)
        entry["values"] = [[round(v, 4) for v in column] for column in read[len(prompt_ids) :].T.tolist()]
    render(found, shown, out)


def render(flags: Flags, rows: Sequence[dict[str, Any]], out: str | Path) -> None:
    """Write the page. A row has id, set, prompt, tokens, and for each vector its difference, percentile and values."""
    keys = list(flags.summary)
    columns = [[v for row in rows for v in row["values"][i]] for i in range(len(keys))]
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        (files("persona_vectors") / "data" / "shipped" / "report.html").read_text(encoding="utf-8")
    )
    text = page.render(
        title=flags.settings["data"],
        keys=keys,
        settings=flags.settings,
        counts=flags.counts,
        summary={key: asdict(found) for key, found in flags.summary.items()},
        labelled={key: str(found.labelled) for key, found in flags.summary.items() if found.labelled},
        best=flags.best_lines(),
        histograms=[_histogram(flags, key) for key in keys],
        sets=list(dict.fromkeys(name for row in rows for name in row["set"].split(", "))),
        rows=list(rows),
        spans=[robust_span(column) for column in columns],
    )
    with atomic_path(out) as temporary:
        temporary.write_text(text, encoding="utf-8")


def pick_rows(flags: Flags, *, each: int, seed: int) -> dict[Place, dict[str, Any]]:
    """Return the highest and lowest rows of each vector and some at random: why, differences and percentiles."""
    keys, rng = list(flags.summary), random.Random(seed)
    extremes: dict[str, list[tuple[float, Place]]] = {f"{end} {key}": [] for key in keys for end in ("top", "bottom")}
    some: list[tuple[float, Place]] = []
    columns = [f"{key}_{name}" for key in keys for name in ("difference", "percentile")]
    for batch in flag_batches(flags.path, ["row", "turn"]):
        _keep(some, ((rng.random(), place) for place in zip(batch["row"], batch["turn"])), each)
    for key in keys:
        for batch in flag_batches(flags.path, ["row", "turn", f"{key}_difference"]):
            places = zip(batch["row"], batch["turn"])
            pairs = [(d, place) for d, place in zip(batch[f"{key}_difference"], places) if d is not None]
            _keep(extremes[f"top {key}"], pairs, each)
            _keep(extremes[f"bottom {key}"], ((-d, row) for d, row in pairs), each)
    why: dict[Place, list[str]] = {}
    for name, kept in {**extremes, "random": some}.items():
        for _, row in kept:
            why.setdefault(row, []).append(name)
    picked = {}
    for batch in flag_batches(flags.path, ["row", "turn", *columns]):
        for i, row in enumerate(zip(batch["row"], batch["turn"])):
            if row in why:
                read = [[batch[f"{key}_{name}"][i] for key in keys] for name in ("difference", "percentile")]
                picked[row] = {"set": ", ".join(why[row]), "differences": read[0], "percentiles": read[1]}
    return picked


def _keep(heap: list[tuple[float, Place]], items: Iterable[tuple[float, Place]], size: int) -> None:
    heap[:] = heapq.nlargest(size, [*heap, *items])


def _histogram(flags: Flags, key: str) -> dict[str, Any]:
    """Return the bars of a histogram, in a picture of 360 x 110."""
    column = f"{key}_difference"
    found = [np.array([v for v in b[column] if v is not None]) for b in flag_batches(flags.path, [column])]
    found = [values for values in found if len(values)]
    if not found:
        return {"key": key, "bars": [], "low": "no values", "high": "", "places": {}}
    low, high = min(v.min() for v in found), max(v.max() for v in found)
    edges = np.linspace(low, high if high > low else low + 1, BARS + 1)
    counts = np.sum([np.histogram(values, edges)[0] for values in found], axis=0)
    limit, width = flags.summary[key].threshold, 360 / BARS
    bars = []
    for i, count in enumerate(counts):
        height = 105 * count / counts.max()
        box = {"x": f"{i * width:.1f}", "y": f"{110 - height:.1f}", "width": f"{width - 1:.1f}"}
        title = f"{edges[i]:+.3f} to {edges[i + 1]:+.3f}: {count:,}"
        flagged = limit is not None and edges[i] >= limit
        bars.append({**box, "height": f"{height:.1f}", "title": title, "flagged": flagged})
    own, places = flags.summary[key], {}
    if low < 0 < edges[-1]:
        places["zero"] = round(float(-low / (edges[-1] - low)) * 360, 1)
    if own.null is not None:
        for name, value in (("mean", own.mean), ("left", -own.null), ("right", own.null)):
            places[name] = round(float(np.clip((value - low) / (edges[-1] - low), 0, 1)) * 360, 1)
    return {"key": key, "bars": bars, "low": f"{low:+.3f}", "high": f"{high:+.3f}", "places": places}
