"""Linear probes of states, scans over single units, and how well scores tell labels."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.special import rel_entr
from torch import Tensor
from torch.nn.functional import normalize


def logistic(states: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weights [unit] and bias by which states [row, unit] have a label of 1: p = sigmoid(states @ w + b).

    Logistic regression with a penalty of 1, of states that have variance 1 in each unit; weights are in their own ones.
    """
    from sklearn.linear_model import LogisticRegression

    middle, scale = states.mean(axis=0), np.maximum(states.std(axis=0), 1e-12)
    fitted = LogisticRegression(max_iter=1000).fit((states - middle) / scale, labels)
    weights = fitted.coef_[0] / scale
    return weights, float(fitted.intercept_[0] - weights @ middle)


def held_out(states: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the matrix [row, row] by which labels become scores: ridge regression on the rows of all other groups.

    States [row, unit] are scaled so that their mean squared distance from the mean is 1, which is the penalty too.
    """
    found = np.zeros((len(states), len(states)))
    for group in np.unique(groups):
        test, train = np.flatnonzero(groups == group), np.flatnonzero(groups != group)
        centred = states - states[train].mean(axis=0)
        centred = centred / max(1e-12, np.sqrt((centred[train] ** 2).sum(axis=1).mean()))
        kernel, middle = centred @ centred[train].T, np.eye(len(train)) - 1 / len(train)
        found[np.ix_(test, train)] = kernel[test] @ np.linalg.solve(kernel[train] + np.eye(len(train)), middle)
    return found


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return how often a row that is scores above one that is not, ties counted half; 0.5 without such a pair."""
    from scipy.stats import rankdata

    true, false = int(labels.sum()), int((~labels).sum())
    if not true or not false:
        return 0.5
    return float((rankdata(scores)[labels].sum() - true * (true + 1) / 2) / true / false)


def left_out_fit(x: np.ndarray, y: np.ndarray) -> float:
    """Return 1 - SSE / SSE of the others' mean, of lines through all points but the one that each predicts."""
    others = [np.delete(np.arange(len(x)), i) for i in range(len(x))]
    fits = [np.polyval(np.polyfit(x[o], y[o], 1), x[i]) for i, o in enumerate(others)]
    return float(1 - ((y - fits) ** 2).sum() / ((y - [y[o].mean() for o in others]) ** 2).sum())


def told_apart(differences: Float[Tensor, "pair layer hidden"]) -> Float[Tensor, "pair layer"]:
    """Return whether each pair's difference points as the mean of all others does, 1 or 0."""
    others = differences.sum(dim=0) - differences
    return ((differences * others).sum(dim=-1) > 0).float()


def scan(p: np.ndarray) -> tuple[float, np.ndarray]:
    """Return Berk and Jones's statistic of p-values [unit], and the subset that maximises it, as indices."""
    order = np.argsort(p)
    alpha, share = p[order], np.arange(1, len(p) + 1) / len(p)
    alpha = np.clip(alpha, 1e-12, 1 - 1e-12)
    scores = len(p) * (rel_entr(share, alpha) + rel_entr(1 - share, 1 - alpha)) * (share > alpha)
    best = int(scores.argmax())
    return float(scores[best]), np.sort(order[: best + 1])


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Return the size of two subsets' intersection over that of their union."""
    return len(np.intersect1d(one, other)) / max(1, len(np.union1d(one, other)))


def jaccard_by_chance(one: int, other: int, units: int) -> float:
    """Return the Jaccard index of random subsets of these sizes that share as many units as they do on average."""
    shared = one * other / units
    return shared / max(1, one + other - shared)


def auroc_within(smoother: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> list[float]:
    """Return the AUROC within each group of the scores that `held_out` gives for labels."""
    scores = smoother @ labels
    return [auroc(scores[groups == group], labels[groups == group]) for group in np.unique(groups)]


def deviations(states: Float[Tensor, "row *unit dim"], agrees: Bool[Tensor, " row"]) -> Tensor:
    """Return the direction towards the rows that agree, as long as the deviation of the projections on it."""
    unit = normalize(states[agrees].mean(dim=0) - states[~agrees].mean(dim=0), dim=-1)
    return unit * (states * unit).sum(dim=-1).std(dim=0)[..., None]


def identified(logprobs: np.ndarray) -> np.ndarray:
    """Return 1 for each state, [state, word], that raises its own word most above the word's mean over states."""
    return ((logprobs - logprobs.mean(axis=0)).argmax(axis=1) == np.arange(len(logprobs))).astype(float)


def signed_difference(states: Float[Tensor, "statement reply layer hidden"], signs: Tensor) -> Tensor:
    """Return the mean over statements of the first reply's state less the second's, times each statement's sign."""
    return torch.einsum("slh,s->lh", states[:, 0] - states[:, 1], signs) / len(signs)
