"""Plots: matplotlib figures that are returned, never shown or saved behind the user's back."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from persona_vectors.evaluation import Interval
from persona_vectors.vectors import PersonaVector

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"  # told apart by colour-blind readers too


def plot_vector(vector: PersonaVector, *, layer: int | None = None) -> Figure:
    """Plot a vector's evidence by layer: held-out separation and split-half cosine; its norm beside the residual's."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    evidence, size = figure.subplots(1, 2)
    layers = range(len(vector.directions))
    for values, label, colour in (
        (vector.separation, "separation: held-out AUROC", BLUE),
        (vector.split_half_cosine, "split-half cosine", ORANGE),
    ):
        if values is not None:
            evidence.plot(layers, values.tolist(), color=colour, label=label, marker="o", markersize=3)
    evidence.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    evidence.text(0, 0.51, "AUROC of chance", color=GREY, fontsize=8, va="bottom")
    evidence.set(title=f"{vector.trait}: how reliable", ylabel="AUROC, cosine", ylim=(min([0.0, *_low(vector)]), 1.02))
    if evidence.get_legend_handles_labels()[0]:
        evidence.legend(frameon=False, fontsize=9, loc="lower right")
    size.plot(layers, vector.directions.norm(dim=1).tolist(), color=BLUE, label="|v|", marker="o", markersize=3)
    if vector.residual_norms is not None:
        size.plot(layers, vector.residual_norms.tolist(), color=GREY, label="mean residual norm")
    size.set(title=f"{vector.trait}: how large", ylabel="norm (log scale)", yscale="log")
    size.legend(frameon=False, fontsize=9)
    for axes in (evidence, size):
        axes.set_xlabel("layer (decoder block, from 0)")
        if layer is not None:
            axes.axvline(layer, color=GREY, linewidth=0.8, linestyle=":")
        _bare(axes)
    return figure


def _low(vector: PersonaVector) -> list[float]:
    return [float(values.min()) for values in (vector.separation, vector.split_half_cosine) if values is not None]


def plot_scores(
    scores: Mapping[str, Mapping[float, Interval]], *, title: str, ylabel: str, controls: Sequence[str] = ()
) -> Figure:
    """Plot scores by steering coefficient, {vector: {coefficient: interval}}; `controls` are drawn in grey."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, by_coef in scores.items():
        grey = name in controls
        coefs = sorted(by_coef)
        values = [by_coef[coef] for coef in coefs]
        line: dict[str, Any] = {
            "color": GREY if grey else BLUE,
            "linestyle": "--" if grey else "-",
            "marker": "o",
            "markersize": 4,
        }
        many = grey and len(controls) > 1
        label = f"{len(controls)} random vectors" if many and name == controls[0] else None if many else name
        axes.plot(coefs, [value.mean for value in values], label=label, zorder=1 if grey else 2, **line)
        if not many:
            axes.fill_between(
                coefs, [v.low for v in values], [v.high for v in values], color=line["color"], alpha=0.15, linewidth=0
            )
    axes.set(title=title, xlabel="steering coefficient", ylabel=ylabel)
    axes.legend(frameon=False, fontsize=9, title="mean, 95 % interval by question", title_fontsize=8)
    _bare(axes)
    return figure


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
    _bare(axes)
    return figure


def plot_shift(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot `Shift.rows()`: the mean shift by layer with its 95 % interval, one panel for each pooling."""
    poolings = list(dict.fromkeys(row["pooling"] for row in rows))
    figure = Figure(figsize=(5 * len(poolings), 4), layout="constrained")
    for axes, pooling in zip(figure.subplots(1, len(poolings), squeeze=False)[0], poolings):
        for trait in dict.fromkeys(row["trait"] for row in rows):
            chosen = [row for row in rows if (row["trait"], row["pooling"]) == (trait, pooling)]
            layers = [row["layer"] or 0 for row in chosen]
            line = axes.plot(layers, [row["shift"] for row in chosen], marker="o", markersize=3, label=trait)[0]
            low, high = ([row[end] for row in chosen] for end in ("low", "high"))
            if len(chosen) > 1:
                axes.fill_between(layers, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            else:
                axes.vlines(layers, low, high, color=line.get_color())
        axes.axhline(0, color=GREY, linewidth=0.8, linestyle="--")
        axes.set(title=pooling, xlabel="layer (decoder block, from 0)", ylabel="tuned minus base, on v/|v|")
        axes.legend(frameon=False, fontsize=9)
        _bare(axes)
    return figure


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
