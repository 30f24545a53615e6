"""The tables of the reproduction, and what they and the figures are made of."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_vectors.data.files import atomic_path
from persona_vectors.vectors.vector import PersonaVector
from reproduce_paper.correlations import correlation_rows
from reproduce_paper.outcomes import gather, intervention_rows, set_rows
from reproduce_paper.plots import plot, plot_prevention
from reproduce_paper.runs import Run
from reproduce_paper.study import PLAIN, Study


def report(
    study: Study,
    runs: Sequence[Run],
    predicted: dict[str, Tensor],
    others: Sequence[PersonaVector],
    base: Sequence[tuple[dict[str, Any], Tensor]],
) -> None:
    """Write and print the tables of all runs, and plot them."""
    out, read_at = study.out, study.layer
    plain = [run for run in runs if run.kind == PLAIN or run.kind.startswith("set ")]
    results = [study.read(run.name) for run in plain]
    scores = np.array([np.mean(found["score"]) for found, _ in results])
    groups = [run.data for run in plain]
    moved = torch.stack([(states - base[0][1]).mean(dim=0) for _, states in results])
    before = torch.stack([predicted[name] for name in groups])
    lines = correlation_rows(study, "shift", moved, scores, groups, others)
    lines += correlation_rows(study, "predicted", before, scores, groups, others)
    write_table(out / "correlations", lines)
    unit = study.vector.directions[read_at] / study.vector.directions[read_at].norm()
    plot(out / "shift.png", (moved[:, read_at] @ unit).numpy(), scores, groups, "finetuning shift on v/|v|")
    xlabel = "projection difference, before training"
    plot(out / "predicted.png", (before[:, read_at] @ unit).numpy(), scores, groups, xlabel)
    outcomes = gather(study, runs, base)
    sets = [o for o in outcomes if o.name.startswith("set ")]
    compared = [o for o in outcomes if o not in sets]
    write_table(out / "sets", set_rows([o for o in outcomes if o in sets or o.name in ("base model", PLAIN)]))
    write_table(out / "interventions", intervention_rows(compared))
    plot_prevention(out / "prevention.png", compared)
    for name in ("sets", "correlations", "interventions"):
        print((out / f"{name}.md").read_text(encoding="utf-8"))


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table as CSV, and as Markdown beside it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, "") for name in names] for row in rows]
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in line] for line in values]
    with atomic_path(path.with_suffix(".csv")) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *cells])
    lines = [names, ["---"] * len(names), *cells]
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
