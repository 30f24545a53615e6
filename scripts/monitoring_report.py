"""The table, the CSV files and the figure of the monitoring experiment."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from persona_vectors.data.files import atomic_path
from persona_vectors.data.intervals import Interval


def line(kind: str, predictor: str, r: Interval, within: Interval | None, beaten: str = "") -> dict[str, Any]:
    """Return a line of the table."""
    ends = {"within": np.nan, "within_low": np.nan, "within_high": np.nan}
    if within is not None:
        ends = {"within": within.mean, "within_low": within.low, "within_high": within.high}
    found = {"r": r.mean, "low": r.low, "high": r.high}
    return {"prompts": kind, "predictor": predictor, **found, **ends, "below_the_vector": beaten}


def report(lines: Sequence[dict[str, Any]], title: str) -> str:
    """Return the correlations as a Markdown table."""
    rows = [
        f"{title}\n",
        "| prompts | predictor | r [95 %] | r within a condition [95 %] | controls below |",
        "|---" * 5 + "|",
    ]
    for entry in lines:
        r = f"{entry['r']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
        within = "" if np.isnan(entry["within"]) else f"{entry['within']:.2f} [{entry['within_low']:.2f}, "
        within += within and f"{entry['within_high']:.2f}]"
        rows.append(f"| {entry['prompts']} | {entry['predictor']} | {r} | {within} | {entry['below_the_vector']} |")
    return "\n".join(rows)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(points: Sequence[dict], lines: Sequence[dict[str, Any]], trait: str, layer: int) -> Figure:
    """Plot score against projection, coloured by condition, for system prompts and many-shot prompts."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, kind, title in zip(figure.subplots(1, 2), ("system", "shots"), ("graded system prompts", "many-shot")):
        names = [name for name in dict.fromkeys(p["condition"] for p in points) if name.startswith(kind)]
        for index, name in enumerate(names):
            own = [p for p in points if p["condition"] == name]
            share = index / max(1, len(names) - 1)
            colour = tuple((1 - share) * low + share * high for low, high in zip((0.0, 0.45, 0.7), (0.84, 0.37, 0.0)))
            x, y = ([p[key] for p in own] for key in ("projection", "score"))
            axes.scatter(x, y, s=12, color=colour, alpha=0.6, linewidths=0, label=name.split()[1])
        own_line = next(entry for entry in lines if entry["prompts"] == kind)
        axes.set_title(f"{title}: r {own_line['r']:.2f} [{own_line['low']:.2f}, {own_line['high']:.2f}]")
        axes.set(xlabel=f"projection before the answer, layer {layer}", ylabel=f"{trait}: mean score of the answers")
        legend = "level (8: encouraged)" if kind == "system" else "examples shown"
        axes.legend(frameon=False, fontsize=8, title=legend, title_fontsize=8, ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure
