"""How well differences tell labelled samples apart, beside random directions, answer length and sentiment."""

from pathlib import Path
from typing import Any

import numpy as np

from persona_vectors.data.intervals import Interval
from persona_vectors.flagging.nulls import KEPT
from persona_vectors.flagging.results import Labelled
from persona_vectors.vectors import probes
from persona_vectors.vectors.nulls import halves


def auroc(values: np.ndarray, labels: np.ndarray) -> float:
    """Return how often a true sample lies above a false one, ties counted half; nan where one of them is missing."""
    return probes.auroc(values, labels) if 0 < labels.sum() < len(labels) else float("nan")


def auroc_interval(values: np.ndarray, labels: np.ndarray, prompts: np.ndarray) -> Interval:
    """Return the AUROC with its 95 % interval, where samples of one prompt count as one cluster (Obuchowski 1997)."""
    from scipy.stats import rankdata

    whole, ranks = auroc(values, labels), rankdata(values)
    if np.isnan(whole):
        return Interval(whole, whole, whole)
    influence = np.zeros(len(values))
    for side, sign in ((labels, 1), (~labels, -1)):
        beaten = (ranks[side] - rankdata(values[side])) / (~side).sum()  # the share of the other side that lies below
        influence[side] = sign * (beaten - (whole if sign > 0 else 1 - whole)) / side.sum()
    sums = np.bincount(prompts, influence)
    error = np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) if len(sums) > 1 else float("nan")
    low, high = whole - 1.96 * error, whole + 1.96 * error
    return Interval(whole, float(np.maximum(low, 0)), float(np.minimum(high, 1)))


def auroc_within(values: np.ndarray, labels: np.ndarray, prompts: np.ndarray) -> float | None:
    """Return how often a true sample lies above a false one of its own prompt; None where no prompt has both."""
    from scipy.stats import rankdata

    sizes, true = np.bincount(prompts), np.bincount(prompts, labels)
    pairs = (true * (sizes - true)).sum()
    if not pairs:
        return None
    ranks = rankdata(prompts * (len(values) + 1.0) + rankdata(values))  # one prompt after the other
    ranks -= (np.cumsum(sizes) - sizes)[prompts]
    return float((ranks[labels].sum() - (true * (true + 1) / 2).sum()) / pairs)


class LabelledRows:
    """The labelled samples of a dataset, on the disk, one vector or layer of them in memory at a time."""

    def __init__(self, folder: Path, keys: int, randoms: dict[str, slice], controls: int, labelled: int) -> None:
        plain = [("label", "?"), ("prompt", "u8"), ("length", "f4"), ("sentiment", "f4")]
        self.types = {
            "rows": np.dtype([*plain, ("difference", "f4", (keys,))]),
            "random": np.dtype([("label", "?"), *[(name, "f4", (controls,)) for name in randoms]]),
        }
        self.paths = {name: folder / f"labelled-{name}.bin" for name in self.types}
        for path in self.paths.values():
            path.write_bytes(b"")
        self.chosen = np.zeros(labelled, bool)
        self.chosen[np.random.default_rng(0).choice(labelled, min(labelled, KEPT), replace=False)] = True
        self.place = 0

    def add(self, rows: dict[str, Any]) -> None:
        """Take in a part's rows; those without a label or a difference are left out."""
        known = np.array([i for i, label in enumerate(rows["label"]) if label is not None], int)
        chosen, self.place = self.chosen[self.place : self.place + len(known)], self.place + len(known)
        there = ~np.isnan(rows["difference"][known]).any(axis=1)
        self._append("rows", rows, known[there])
        self._append("random", rows, known[there & chosen])

    def _append(self, name: str, rows: dict[str, Any], which: np.ndarray) -> None:
        prompts = np.array([int(text, 16) for text in rows["prompt_hash"]], np.uint64)
        columns = rows | {"length": rows["answer_tokens"], "prompt": prompts}
        found = np.zeros(len(which), self.types[name])
        for column in found.dtype.names or ():
            found[column] = np.asarray(columns[column])[which]
        with self.paths[name].open("ab") as file:
            file.write(found.tobytes())

    def _mapped(self, name: str) -> np.ndarray:
        path, kind = self.paths[name], self.types[name]
        return np.asarray(np.memmap(path, kind, mode="r")) if path.stat().st_size else np.zeros(0, kind)

    def random(self, name: str) -> np.ndarray:
        """Return the AUROC of each of a layer's random directions, on at most KEPT rows, [direction]."""
        found = self._mapped("random")
        labels, values = np.array(found["label"]), found[name]
        return np.array([auroc(values[:, i], labels) for i in range(values.shape[1])])

    def summaries(self, nulls: list[np.ndarray]) -> list[Labelled]:
        """Return every key's, each beside the AUROCs of its layer's random directions."""
        found = self._mapped("rows")
        labels = np.array(found["label"])
        prompts = np.unique(found["prompt"], return_inverse=True)[1]
        plain = [auroc(np.array(found[name]), labels) for name in ("length", "sentiment")]
        counts, summaries = (int(labels.sum()), int((~labels).sum())), []
        for i, random in enumerate(nulls):
            values = np.array(found["difference"][:, i])
            isotropic, covariance = (np.abs(half - 0.5) for half in halves(random))
            null = (_most(isotropic), _most(covariance)) if len(random) else None
            whole, within = auroc_interval(values, labels, prompts), auroc_within(values, labels, prompts)
            summaries.append(Labelled(whole, *counts, within, null, *plain))
        return summaries


def _most(values: np.ndarray) -> float:
    """Return the least of the values that 95 % or more of them do not surpass."""
    return float(np.quantile(values, 0.95, method="higher"))
