"""Linear probes of states, logistic ones and ridge regression held out by group, and how well scores tell labels."""

import numpy as np


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
