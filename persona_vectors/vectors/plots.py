"""Figures of vectors: their evidence, their cosines, how far groups part."""

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Float
from torch import Tensor

from persona_vectors.vectors.drawing import BLUE, Figure, bare, evidence_figure
from persona_vectors.vectors.geometry import Separation
from persona_vectors.vectors.vector import PersonaVector


def plot_vector(vector: PersonaVector, *, layer: SupportsIndex | None = None) -> Figure:
    """Plot a vector's evidence by layer: held-out separation and split-half cosine; its norm beside the residual's."""
    return evidence_figure(vector, layer)


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
