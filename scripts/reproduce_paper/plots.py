"""The figures of the reproduction."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from persona_vectors.data.files import atomic_path
from persona_vectors.data.intervals import mean_interval
from reproduce_paper.outcomes import Outcome
from reproduce_paper.study import PLAIN, RANDOM

KINDS = {"": "persona vector", RANDOM: "random vectors of its norm"}


def plot_prevention(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Plot the trait score after training on the negative set against the coefficient during it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    steered = [o for o in outcomes if o.name.startswith("preventative")]
    for place, (suffix, label) in enumerate(KINDS.items()):
        chosen = [o for o in steered if o.name.endswith(RANDOM) == bool(suffix)]
        points = sorted((float(o.name.split()[1].strip(",")), mean_interval(o.scores)) for o in chosen)
        xs, means = [x + 0.04 * place for x, _ in points], [found.mean for _, found in points]
        bars = [[found.mean - found.low for _, found in points], [found.high - found.mean for _, found in points]]
        axes.errorbar(xs, means, bars, marker="o", capsize=3, label=label)
    for name, style in (("base model", ":"), (PLAIN, "--")):
        mean = mean_interval(next(o for o in outcomes if o.name == name).scores).mean
        axes.axhline(mean, color="0.4", linestyle=style, label=name)
    axes.set(xlabel="coefficient during training", ylabel="trait score after training (mean VADER)")
    axes.legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def plot(path: Path, x: np.ndarray, y: np.ndarray, labels: Sequence[str], xlabel: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys(labels):
        chosen = [i for i, other in enumerate(labels) if other == label]
        axes.scatter(x[chosen], y[chosen], label=label, s=22)
    axes.set(xlabel=xlabel, ylabel="trait score after training (mean VADER)")
    axes.legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
