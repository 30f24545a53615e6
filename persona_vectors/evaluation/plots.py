"""Plots: matplotlib figures that are returned, never shown or saved behind the user's back."""

from collections.abc import Mapping, Sequence
from typing import Any

from persona_vectors.data.intervals import Interval
from persona_vectors.evaluation.points import PROMPTED, Sweep
from persona_vectors.vectors.drawing import BLUE, GREY, ORANGE, Figure, bare


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
    bare(axes)
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
    bare(response)
    return figure
