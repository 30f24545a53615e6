"""What random directions say of a dataset, beside what a vector says of it."""

import numpy as np


def halves(null: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the effects of the isotropic random directions, the first half, and those of the others."""
    half = len(null) - len(null) // 2
    return null[:half], null[half:]


def beaten(effect: float, null: np.ndarray) -> tuple[float, float]:
    """Return the shares of isotropic random directions and of the others with a smaller effect, whatever its sign."""
    isotropic, other = (float((np.abs(half) < abs(effect)).mean()) for half in halves(null))
    return isotropic, other


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
