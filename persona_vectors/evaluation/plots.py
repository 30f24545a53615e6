"""Plots: matplotlib figures that are returned, never shown or saved behind the user's back."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from persona_vectors.evaluation.answers import Interval
from persona_vectors.evaluation.sweeping import PROMPTED, Sweep
from persona_vectors.monitoring.projection import Scores
from persona_vectors.vectors.geometry import Separation
from persona_vectors.vectors.vector import PersonaVector

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


def plot_drift(scores: Scores, *, pooling: str = "response_mean", title: str = "projection by turn") -> Figure:
    """Plot `project(..., by_turn=True)`: each conversation's projections by turn in grey, and their mean."""
    figure = Figure(figsize=(6, 0.4 + 2.4 * len(scores.keys)), layout="constrained")
    panels = figure.subplots(len(scores.keys), squeeze=False)[:, 0]
    turns = range(1, int(scores.turn.max()) + 2)
    for axes, (key, values) in zip(panels, scores[pooling].items()):
        for conversation in scores.conversation.unique():
            own = scores.conversation == conversation
            axes.plot(scores.turn[own] + 1, values[own], color=GREY, alpha=0.4, linewidth=0.8)
        means = [float(values[scores.turn == turn - 1].nanmean()) for turn in turns]
        count = len(scores.conversation.unique())
        label = "mean" if count == 1 else f"mean of {count} conversations"
        axes.plot(turns, means, color=BLUE, marker="o", markersize=4, label=label)
        axes.set(
            ylabel=key if isinstance(key, str) else f"{key[0]}, layer {key[1]}", xticks=turns[:: 1 + len(turns) // 12]
        )
        _bare(axes)
    panels[0].set_title(title)
    panels[0].legend(frameon=False, fontsize=9)
    panels[-1].set_xlabel(f"turn ({pooling}; each grey line is a conversation)")
    return figure


def plot_sweep(sweep: Sweep) -> Figure:
    """Plot what chose (the effect at each layer and strength), and what is reported (the score at each strength)."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    grid, response = figure.subplots(1, 2)
    chosen = [point for point in sweep.stage("choose") if point.layer is not None]
    layers = sorted({point.layer for point in chosen if point.layer is not None})
    strengths = sorted({point.strength for point in chosen})
    effect = {(point.layer, point.strength): point.effect.mean for point in chosen}
    rows = [[effect[layer, strength] for layer in layers] for strength in strengths]
    limit = max(abs(value) for row in rows for value in row) or 1.0
    image = grid.imshow(rows, origin="lower", aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit)
    figure.colorbar(image, ax=grid, label="trait score less the plain model's")
    grid.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    grid.set_yticks(range(len(strengths)), [f"{strength:+g}" for strength in strengths])
    grid.plot(layers.index(sweep.layer), strengths.index(sweep.strength), "s", color="black", fillstyle="none", ms=16)
    grid.set(title=f"{sweep.trait}: extraction questions", xlabel="layer", ylabel=sweep.unit)
    reported = sweep.stage("report")
    own = sorted(
        (p for p in reported if p.name == sweep.trait or (p.layer is None and p.coef == 0)),
        key=lambda point: point.strength,
    )
    own = [point for point in own if point.name != PROMPTED]
    x = [point.strength for point in own]
    response.plot(x, [p.score.mean for p in own], color=BLUE, marker="o", markersize=4, label=sweep.trait)
    response.fill_between(x, [p.score.low for p in own], [p.score.high for p in own], color=BLUE, alpha=0.15, lw=0)
    response.plot(x, [p.coherence.mean for p in own], color=ORANGE, linestyle="--", label="coherence")
    controls = [point.score.mean for point in sweep.controls]
    if controls:
        label = f"{len(controls)} random vectors"
        response.plot([sweep.strength] * len(controls), controls, "_", color=GREY, markersize=12, label=label)
    for point in reported:
        if point.name == PROMPTED:
            response.axhline(point.score.mean, color=GREY, linestyle=":", label=PROMPTED)
    response.set(title=f"layer {sweep.layer}: evaluation questions", xlabel=sweep.unit, ylabel="score, 0 to 100")
    response.legend(frameon=False, fontsize=8)
    _bare(response)
    return figure


def plot_cosines(matrix: Float[Tensor, "row column"], names: Sequence[str]) -> Figure:
    """Plot a matrix with its numbers: cosines between traits or layers, or vectors' effects on traits."""
    figure = Figure(figsize=(2.8 + 0.7 * len(names), 1.6 + 0.6 * len(names)), layout="constrained")
    axes = figure.subplots()
    limit = float(matrix.abs().max()) or 1.0
    image = axes.imshow(matrix.numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
    figure.colorbar(image, ax=axes)
    axes.set_xticks(range(matrix.shape[1]), list(names), rotation=45, ha="right")
    axes.set_yticks(range(matrix.shape[0]), list(names))
    if len(names) <= 12:
        for (row, column), value in np.ndenumerate(matrix.numpy()):
            ink = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    return figure


def plot_separation(layers: Sequence[Separation]) -> Figure:
    """Plot the four separation indices by layer; the last falls as the groups part, the others rise."""
    titles = "AUROC", "Silhouette", "Calinski-Harabasz", "Davies-Bouldin"
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    for axes, name, title in zip(figure.subplots(1, len(titles)), Separation._fields, titles):
        axes.plot([getattr(each, name) for each in layers], color=BLUE, marker="o", markersize=3)
        axes.set(title=title, xlabel="layer (decoder block, from 0)")
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
