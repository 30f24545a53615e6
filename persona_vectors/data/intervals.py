"""Means and correlations with their bootstrap intervals, resampling whole clusters."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean with the bounds of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self}"

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.mean:+{spec}} [{self.low:+{spec}}, {self.high:+{spec}}]"


def mean_interval(by_question: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """Return the mean over questions and its 95 % interval, resampling whole questions.

    `by_question` holds, for each question, the scores of its answers; nan scores are left out.
    """
    from scipy.stats import bootstrap

    means = np.array([np.nanmean(scores) for scores in by_question if not np.all(np.isnan(scores))])
    if len(means) < 2:
        return Interval(float(means.mean()) if len(means) else float("nan"), float("nan"), float("nan"))
    if np.ptp(means) == 0:
        return Interval(*(float(means[0]),) * 3)
    rng = np.random.default_rng(seed)
    low, high = bootstrap((means,), np.mean, n_resamples=5000, method="percentile", rng=rng).confidence_interval
    return Interval(float(means.mean()), float(low), float(high))


def correlation_interval(
    x: Sequence[float], y: Sequence[float], questions: Sequence[int], *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Return Pearson's r of x and y and its 95 % bootstrap interval, resampling whole questions.

    `questions` says which question each point is from; points with nan on either side are left out.
    """
    points = np.stack([x, y]).astype(float)
    known = ~np.isnan(points).any(axis=0)
    points, labels = points[:, known], np.asarray(questions)[known]
    groups = [points[:, labels == label] for label in np.unique(labels)]
    rng = np.random.default_rng(seed)
    drawn = [
        _pearson(np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))], axis=1))
        for _ in range(resamples)
    ]
    return Interval(_pearson(points), *map(float, np.nanquantile(drawn, [0.025, 0.975])))


def _pearson(points: np.ndarray) -> float:
    """Return the correlation of two rows; nan where one of them does not vary."""
    centred = points - points.mean(axis=1, keepdims=True)
    size = np.sqrt((centred**2).sum(axis=1)).prod()
    return float((centred[0] * centred[1]).sum() / size) if size > 0 else float("nan")
