"""One vector's differences over a dataset, sorted on the disk for percentiles."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from persona_vectors.flagging.results import Summary
from persona_vectors.vectors.nulls import beaten, halves


class Column:
    """Differences of one vector: running sums in memory, the values in a file that is sorted in place."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self.sum, self.squares = path, 0, 0.0, 0.0
        path.unlink(missing_ok=True)
        path.touch()

    def add(self, values: np.ndarray) -> None:
        wide = values[~np.isnan(values)].astype(np.float64)
        before = self.sum / self.count if self.count else 0.0
        self.count += len(wide)
        self.sum += float(wide.sum())
        after = self.sum / self.count if self.count else 0.0
        # the sum of squared deviations, updated by whole parts: exact where a sum of squares would cancel
        self.squares += float(((wide - after) ** 2).sum()) + (self.count - len(wide)) * (after - before) ** 2
        with self.path.open("ab") as file:
            file.write(wide.astype(np.float32).tobytes())

    def sort(self) -> None:
        if self.count:
            values = np.memmap(self.path, np.float32, mode="r+")
            values.sort()
            values.flush()
        self.values = np.memmap(self.path, np.float32, mode="r") if self.count else np.zeros(0, np.float32)

    def percentiles(self, values: np.ndarray) -> np.ndarray:
        """Return the share of the column below each value, ties counted half, in percent."""
        if not self.count:
            return np.full(len(values), np.nan, np.float32)
        below, upto = (np.searchsorted(self.values, values, side=side) for side in ("left", "right"))
        return np.where(np.isnan(values), np.nan, 50 * (below + upto) / self.count).astype(np.float32)

    def at(self, percentile: float) -> float:
        place = percentile / 100 * (self.count - 1)
        low, high = self.values[math.floor(place)], self.values[math.ceil(place)]
        return float(low + (high - low) * (place - math.floor(place)))

    def upwards(self, limit: float | None) -> int:
        """Return how many values are at or above a limit."""
        return 0 if limit is None else self.count - int(np.searchsorted(self.values, np.float32(limit)))

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else math.nan

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan

    @property
    def effect(self) -> float:
        """The mean in standard deviations; nan where they do not vary."""
        return self.mean / (self.deviation or math.nan)

    def summary(self, threshold: float | None, null: np.ndarray) -> Summary:
        """Return the column's, beside the effects of random directions, [direction]."""
        mean, deviation, enough = self.mean, self.deviation, None
        if mean and not math.isnan(deviation):
            enough = max(2, math.ceil((1.96 * deviation / mean) ** 2))
        error = deviation / math.sqrt(self.count) if self.count else math.nan
        found = Summary(mean, error, self.count, enough, threshold, self.upwards(threshold))
        if not len(null) or not deviation:
            return found
        shares = beaten(self.effect, null)
        band = max(float(np.quantile(np.abs(half), 0.95)) for half in halves(null))
        return replace(found, beaten_isotropic=shares[0], beaten_covariance=shares[1], null=band * deviation)
