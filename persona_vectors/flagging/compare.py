"""Which of two flagged datasets will move a trait more."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persona_vectors.data.errors import InputError
from persona_vectors.data.intervals import Interval
from persona_vectors.flagging.parts import flag_batches, read_header

SUBSAMPLES = 1000


@dataclass(frozen=True)
class Comparison:
    """One vector's mean projection difference in two datasets, and which of them will move the trait more."""

    first: Interval
    second: Interval
    gap: Interval
    """First minus second, with its 95 % interval."""
    enough: int | None
    """How many samples of each show the same sign of the gap in 95 % of 1,000 random subsamples; None: no number
    up to the smaller dataset's."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row: both means, their gap, and how many samples show its sign."""
        row: dict[str, Any] = self.first.columns("first") | self.second.columns("second") | self.gap.columns("gap")
        return [row | {"enough": self.enough}]

    def __str__(self) -> str:
        if self.gap.low <= 0 <= self.gap.high:
            verdict = "no telling which moves the trait more"
        else:
            verdict = f"the {'first' if self.gap.mean > 0 else 'second'} will move the trait more"
        enough = "" if self.enough is None else f"; {self.enough} samples of each suffice"
        return f"{self.first:+.2f} and {self.second:+.2f}, gap {self.gap:+.2f}: {verdict}{enough}"


def compare_datasets(flags: str | Path, other: str | Path, *, seed: int = 0) -> dict[str, Comparison]:
    """Compare two flags files, vector by vector, with 95 % intervals clustered by prompt.

    Raises InputError where they were made with other models, vectors, layers or baselines.
    """
    paths = [Path(flags), Path(other)]
    headers = [read_header(path) for path in paths]
    for name in ("weights", "vectors", "layers", "baseline", "max_new_tokens"):
        mine, theirs = (header["settings"][name] for header in headers)
        if mine != theirs:
            raise InputError(f"{flags} has {name}={mine!r} and {other} {theirs!r}: flag both with the same settings")
    compared = {}
    for key in headers[0]["summary"]:
        columns = [_differences(path, key) for path in paths]
        (a, error_a), (b, error_b) = (_clustered(values, prompts) for values, prompts in columns)
        gap = _interval(a - b, float(np.hypot(error_a, error_b)))
        enough = _enough([values for values, _ in columns], a - b, np.random.default_rng(seed))
        compared[key] = Comparison(_interval(a, error_a), _interval(b, error_b), gap, enough)
    return compared


def _differences(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a vector's differences, and a number for each one's prompt."""
    values, prompts = [], []
    for batch in flag_batches(path, ["prompt_hash", f"{key}_difference"]):
        values.append(np.array(batch[f"{key}_difference"], np.float32))
        prompts.append(np.array([int(text, 16) for text in batch["prompt_hash"]], np.uint64))
    found, asked = (np.concatenate([*parts, empty]) for parts, empty in ((values, []), (prompts, [])))
    kept = ~np.isnan(found)
    if kept.sum() < 2:
        raise InputError(f"{path} has {kept.sum()} samples with a difference: give two or more")
    return found[kept], np.unique(asked[kept], return_inverse=True)[1]


def _clustered(values: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """Return the mean, and its standard error where samples of one prompt count as one cluster."""
    mean = float(values.mean(dtype=np.float64))
    sums = np.bincount(prompts, values - mean)
    scale = len(sums) / (len(sums) - 1) if len(sums) > 1 else np.nan
    return mean, float(np.sqrt(scale * (sums**2).sum()) / len(values))


def _interval(mean: float, error: float) -> Interval:
    return Interval(mean, mean - 1.96 * error, mean + 1.96 * error)


def _enough(columns: Sequence[np.ndarray], gap: float, rng: np.random.Generator) -> int | None:
    size, smallest = 2, min(map(len, columns))
    while size <= smallest:
        means = [rng.choice(values, (SUBSAMPLES, size)).mean(axis=1) for values in columns]
        if (np.sign(means[0] - means[1]) == np.sign(gap)).mean() >= 0.95:
            return size
        size = max(size + 1, round(size * 1.3))
    return None
