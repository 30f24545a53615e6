"""Figures of vectors: their evidence, their cosines; and what every figure of the package shares."""

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from persona_vectors.vectors.geometry import Separation
from persona_vectors.vectors.vector import PersonaVector

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"  # told apart by colour-blind readers too


def plot_vector(vector: PersonaVector, *, layer: SupportsIndex | None = None) -> Figure:
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
            axes.axvline(int(layer), color=GREY, linewidth=0.8, linestyle=":")
        bare(axes)
    return figure


def _low(vector: PersonaVector) -> list[float]:
    return [float(values.min()) for values in (vector.separation, vector.split_half_cosine) if values is not None]


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
        bare(axes)
    return figure


def bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
