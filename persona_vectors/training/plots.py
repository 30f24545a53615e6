"""Figures of training runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from persona_vectors.vectors.drawing import GREY, Figure, bare


def plot_history(history: Sequence[Mapping[str, float]]) -> Figure:
    """Plot what a `ProjectionCallback` logged: each probe's mean projection by training step."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in [key for key in history[0] if key != "step"]:
        axes.plot(
            [row["step"] for row in history], [row[name] for row in history], marker="o", markersize=3, label=name
        )
    axes.set(title="Probe prompts while training", xlabel="optimizer step", ylabel="mean projection on v/|v|")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    bare(axes)
    return figure


def plot_shift(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot `Shift.rows()`: the mean shift by layer with its 95 % interval, one panel for each pooling."""
    poolings = list(dict.fromkeys(row["pooling"] for row in rows))
    figure = Figure(figsize=(5 * len(poolings), 4), layout="constrained")
    for axes, pooling in zip(figure.subplots(1, len(poolings), squeeze=False)[0], poolings):
        for trait in dict.fromkeys(row["trait"] for row in rows):
            chosen = [row for row in rows if (row["trait"], row["pooling"]) == (trait, pooling)]
            layers = [row["layer"] for row in chosen]
            line = axes.plot(layers, [row["shift"] for row in chosen], marker="o", markersize=3, label=trait)[0]
            low, high = ([row[f"shift_{end}"] for row in chosen] for end in ("low", "high"))
            if len(chosen) > 1:
                axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            else:
                axes.vlines(layers, low, high, color=line.get_color())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.axhline(0, color=GREY, linewidth=0.8, linestyle="--")
        axes.set(title=pooling, xlabel="layer (decoder block, from 0)", ylabel="tuned minus base, on v/|v|")
        axes.legend(frameon=False, fontsize=9)
        bare(axes)
    return figure
