"""What every figure of the package shares; a vector's evidence, drawn."""

from io import BytesIO
from typing import Any, SupportsIndex

from matplotlib import figure as matplotlib_figure
from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"  # told apart by colour-blind readers too


class Figure(matplotlib_figure.Figure):
    """A figure that shows itself in a notebook, also in one without `%matplotlib inline`."""

    def _repr_png_(self) -> bytes:
        written = BytesIO()
        self.savefig(written, format="png")
        return written.getvalue()


def evidence_figure(vector: Any, layer: SupportsIndex | None) -> Figure:
    """Draw a PersonaVector's evidence by layer: separation, split-half cosine, and its norm."""
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
            axes.axvline(int(layer), color=GREY, linewidth=0.8, linestyle=":")
        bare(axes)
    return figure


def _low(vector: Any) -> list[float]:
    return [float(values.min()) for values in (vector.separation, vector.split_half_cosine) if values is not None]


def bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
