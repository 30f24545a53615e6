"""How the shift, and its prediction, go with the trait score, beside other vectors and random directions."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_vectors.data.intervals import bootstrap
from persona_vectors.model.pooling import pool
from persona_vectors.vectors.controls import random_null, random_vector
from reproduce_paper.study import Study

PAPER = {"shift": ".76 to .97", "predicted": ".88 to .95"}
NULLS = 100


def correlations(moved: Tensor, scores: np.ndarray, directions: Tensor) -> np.ndarray:
    """Return r at each layer between the scores [run] and the projections of `moved` [run, layer, hidden]."""
    units = directions / directions.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    values = torch.einsum("rlh,lh->lr", moved, units).numpy()
    return np.array([np.corrcoef(row, scores)[0, 1] if np.ptp(row) > 0 else 0.0 for row in values])


def correlation_rows(
    study: Study, kind: str, moved: Tensor, scores: np.ndarray, groups: list[str], others: Any
) -> list:
    """Return the table's lines: our vector, other traits' vectors and the null, each with the best of all layers."""
    at = slice(study.layer, study.layer + 1)

    def r_of(rows: np.ndarray) -> float:
        if np.ptp(scores[rows]) == 0:
            return float("nan")
        return float(correlations(moved[rows][:, at], scores[rows], study.vector.directions[at])[0])

    read = bootstrap(r_of, groups, resamples=1000)
    real = pool(study.model, study.neutral).means[:, 0]
    randoms = [random_vector(study.vector, seed=seed, like=real) for seed in range(NULLS)]
    found = torch.stack([torch.from_numpy(correlations(moved, scores, other.directions)).abs() for other in randoms])
    own = correlations(moved, scores, study.vector.directions)
    # scores that do not vary, as a tiny model's may not, correlate with nothing
    null = random_null(torch.from_numpy(np.abs(own)), found) if np.ptp(scores) > 0 else None
    line = {"against": kind, "direction": study.vector.trait, "r": read.mean, "low": read.low, "high": read.high}
    lines = [line | {"best of layers": null.own if null else float("nan"), "paper": PAPER[kind]}]
    for other in others:
        r = correlations(moved, scores, other.directions)
        best = {"best of layers": np.abs(r).max(), "paper": ""}
        lines.append({"against": kind, "direction": other.trait, "r": r[study.layer], "low": "", "high": ""} | best)
    for percentile, name in ((50, "median of absolute r"), (97.5, "97.5th percentile of absolute r")):
        line = {"against": kind, "direction": f"{NULLS} random, covariance of real activations: {name}"}
        line |= {"r": float(np.percentile(found[:, study.layer], percentile)), "low": "", "high": ""}
        lines.append(line | {"best of layers": null.at(percentile) if null else float("nan"), "paper": ""})
    return lines
