"""How the shift, and its prediction, go with the trait score, beside other vectors and random directions."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_vectors.data.intervals import bootstrap
from persona_vectors.vectors.controls import random_null
from reproduce_paper.study import Study

PAPER = {"shift": ".76 to .97", "predicted": ".88 to .95"}
NULLS = 100
"""Random directions of each kind."""


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
    line = {"against": kind, "direction": study.vector.trait, "r": read.mean, "low": read.low, "high": read.high}
    randoms = study.moments.random_vectors(study.vector, count=2 * NULLS)
    directions = torch.stack([study.vector.directions, *(each.directions for each in randoms)])
    lines = null_lines(study, moved, scores, line | {"paper": PAPER[kind]}, directions)
    for other in others:
        r = correlations(moved, scores, other.directions)
        best = {"best of layers": np.abs(r).max(), "paper": ""}
        lines.append({"against": kind, "direction": other.trait, "r": r[study.layer], "low": "", "high": ""} | best)
    white = torch.stack([directions[:, k].double() @ study.moments.whitener(k) for k in range(directions.shape[1])], 1)
    r = float(correlations(moved[:, at], scores, white[0, at].float())[0])
    line = {"against": kind, "direction": f"{study.vector.trait} whitened", "r": r, "low": "", "high": ""}
    return lines + null_lines(study, moved, scores, line | {"paper": ""}, white.float())


def null_lines(
    study: Study, moved: Tensor, scores: np.ndarray, line: dict[str, Any], directions: Tensor
) -> list[dict[str, Any]]:
    """Return the first direction's line, with the best of all layers, and those of both kinds of random directions."""
    sizes = torch.stack([torch.from_numpy(correlations(moved, scores, each)).abs() for each in directions])
    kinds = {"isotropic": sizes[1 : 1 + NULLS], "covariance of plain answers": sizes[1 + NULLS :]}
    # scores that do not vary, as a tiny model's may not, correlate with nothing
    nulls = {name: random_null(sizes[0], some) if np.ptp(scores) > 0 else None for name, some in kinds.items()}
    lines = [line | {"best of layers": float(sizes[0].max())}]
    for name, some in kinds.items():
        for percentile, words in ((50, "median"), (97.5, "97.5th percentile")):
            r = float(np.percentile(some[:, study.layer], percentile))
            row = {"direction": f"{words} of absolute r, {NULLS} random, {name}", "r": r, "low": "", "high": ""}
            null = nulls[name]
            lines.append(line | row | {"best of layers": null.at(percentile) if null else float("nan"), "paper": ""})
    return lines
