"""What random directions say of a dataset, beside what a vector says of it."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from persona_vectors.flagging.results import Best
from persona_vectors.vectors.controls import random_null

KEPT = 20_000
"""The most rows of a file whose random directions are looked at one by one, drawn at random."""


def halves(null: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the effects of the isotropic random directions, the first half, and those of the others."""
    half = len(null) - len(null) // 2
    return null[:half], null[half:]


def beaten(effect: float, null: np.ndarray) -> tuple[float, float]:
    """Return the shares of isotropic random directions and of the others with a smaller effect, whatever its sign."""
    isotropic, other = (float((np.abs(half) < abs(effect)).mean()) for half in halves(null))
    return isotropic, other


def best_layer(
    own: Sequence[float], null: Mapping[str, np.ndarray], layers: Sequence[int], chance: float
) -> Best | None:
    """Return the layer at which a vector's score lies furthest from `chance`, beside random directions' best layers.

    `own` is [layer], and `null` has a layer's random directions' under `controls@LAYER`, the first half isotropic.
    None where a score is unknown.
    """
    mine, random = np.abs(np.array(own) - chance), np.abs(np.stack(list(null.values()), axis=-1) - chance)
    if not len(random) or not np.isfinite(mine).all() or not np.isfinite(random).all():
        return None
    found = [random_null(torch.from_numpy(mine), torch.from_numpy(half)) for half in halves(random)]
    place = found[0].layer
    return Best(layers[place], float(own[place]), *[each.percentile / 100 for each in found])


class Spread:
    """Running means and deviations of a layer's random directions; the first half isotropic."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(0), np.zeros(0)

    def add(self, values: np.ndarray) -> None:
        """Take in [row, direction]; rows with no value are left out."""
        values = values[~np.isnan(values).any(axis=1)].astype(np.float64)
        if not len(values) or not values.shape[1]:
            return
        if not self.count:
            self.mean, self.squares = np.zeros(values.shape[1]), np.zeros(values.shape[1])
        middle, weight = values.mean(axis=0), self.count * len(values) / (self.count + len(values))
        self.squares += ((values - middle) ** 2).sum(axis=0) + weight * (middle - self.mean) ** 2
        self.count += len(values)
        self.mean += (middle - self.mean) * len(values) / self.count

    @property
    def effects(self) -> np.ndarray:
        """Each direction's mean in its own standard deviations, [direction]; empty with fewer than two rows."""
        if self.count < 2:
            return np.zeros(0)
        deviation = np.sqrt(self.squares / (self.count - 1))
        return self.mean / np.where(deviation == 0, np.inf, deviation)
