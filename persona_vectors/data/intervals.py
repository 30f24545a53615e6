"""Statistics with their bootstrap intervals, resampling whole clusters."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean, or another statistic, with the bounds of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self}"

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"  # "+.2f" shows signs, where the number is a difference
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def columns(self, name: str) -> dict[str, float]:
        """Return the three numbers under their names in a table: NAME, NAME_low and NAME_high."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


def bootstrap(
    statistic: Callable[[np.ndarray], float], clusters: Iterable[Any], *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Return a statistic of all points with its 95 % percentile interval, resampling whole clusters.

    `statistic` is given the numbers of points, from 0, some of them several times: `lambda i: float(x[i].mean())`.
    `clusters` names each point's cluster: answers to one question are alike, and count as the one draw that they are.
    Draws whose statistic is nan are left out; the bounds are nan where there is one cluster or none.
    """
    labels = np.array(list(clusters))
    groups = [np.flatnonzero(labels == name) for name in np.unique(labels)]
    whole = float(statistic(np.arange(len(labels)))) if groups else float("nan")
    if len(groups) < 2:
        return Interval(whole, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(groups), size=(resamples, len(groups)))
    drawn = [statistic(np.concatenate([groups[i] for i in draw])) for draw in draws]
    if np.isnan(drawn).all():
        return Interval(whole, float("nan"), float("nan"))
    return Interval(whole, *map(float, np.nanquantile(drawn, [0.025, 0.975])))


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
    # `bootstrap` of the mean, for all draws at once: sweeps ask for thousands of these
    rng = np.random.default_rng(seed)
    low, high = bootstrap((means,), np.mean, n_resamples=5000, method="percentile", rng=rng).confidence_interval
    return Interval(float(means.mean()), float(low), float(high))


def correlation_interval(
    x: Sequence[float], y: Sequence[float], clusters: Iterable[Any], *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Return Pearson's r of x and y and its 95 % bootstrap interval, resampling whole clusters.

    `clusters` names each point's cluster, such as its question; points with nan on either side are left out.
    """
    points = np.stack([x, y]).astype(float)
    known = ~np.isnan(points).any(axis=0)
    points = points[:, known]
    labels = [name for name, kept in zip(clusters, known) if kept]
    return bootstrap(lambda i: _pearson(points[:, i]), labels, seed=seed, resamples=resamples)


def _pearson(points: np.ndarray) -> float:
    """Return the correlation of two rows; nan where one of them does not vary."""
    centred = points - points.mean(axis=1, keepdims=True)
    size = np.sqrt((centred**2).sum(axis=1)).prod()
    return float((centred[0] * centred[1]).sum() / size) if size > 0 else float("nan")
