"""What tests of persons say of respondents: item response theory, agreement, ranks, and how far two are apart."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import kendalltau
from torch import Tensor

from persona_vectors.data.intervals import Interval, bootstrap

Items = Mapping[str, Sequence[float]]
"""The items' values of each coordinate of a respondent."""


def two_parameter_fit(choices: Float[Tensor, "respondent item"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return discriminations a [item], difficulties b [item] and abilities theta [respondent] of choices, 0 or 1."""
    nodes, weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(31))
    log_prior = (weights / weights.sum()).log()
    log_a, b = (torch.zeros(choices.shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2))
    chosen = choices.double()

    def joint() -> Tensor:
        logits = log_a.exp() * (nodes[:, None] - b)
        loglik = chosen @ logits.T - torch.nn.functional.softplus(logits).sum(dim=1)
        return loglik + log_prior  # [respondent, node]

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -joint().logsumexp(dim=1).sum() + (log_a**2 / 0.5).sum() + (b**2 / 8).sum()
        value.backward()
        return value

    optimizer = torch.optim.LBFGS([log_a, b], max_iter=60, line_search_fn="strong_wolfe")
    optimizer.step(loss)
    with torch.no_grad():
        return log_a.exp(), b.clone(), joint().softmax(dim=1) @ nodes


def icc(ratings: np.ndarray) -> float:
    """Return ICC(2,1) of ratings [target, rater]: how far single raters agree, their levels included."""
    targets, raters = ratings.shape
    total = ratings.mean()
    rows = raters * ((ratings.mean(axis=1) - total) ** 2).sum() / (targets - 1)
    columns = targets * ((ratings.mean(axis=0) - total) ** 2).sum() / (raters - 1)
    rest = ((ratings - total) ** 2).sum() - (targets - 1) * rows - (raters - 1) * columns
    error = rest / ((targets - 1) * (raters - 1))
    return float((rows - error) / (rows + (raters - 1) * error + raters * (columns - error) / targets))


def standard_changes(one: Items, other: Items) -> dict[str, np.ndarray]:
    """Return each item's change from one model to the other, in deviations of the coordinate's items in the first."""
    return {name: (np.array(other[name]) - values) / np.std(values, ddof=1) for name, values in one.items()}


def change_distance(one: Items, other: Items) -> Interval:
    """Return the root mean square of the coordinates' changes; its interval is over coordinates."""
    moved = np.array([each.mean() for each in standard_changes(one, other).values()])
    return bootstrap(lambda index: float(np.sqrt((moved[index] ** 2).mean())), range(len(moved)))


def robustness(expert: np.ndarray, variants: np.ndarray) -> float:
    """Return the worst case over irrelevant attributes less the expert alone, of utilities [attribute, question]."""
    return float(variants.mean(axis=1).min() - expert.mean())


def level_agreement(levels: np.ndarray) -> float:
    """Return Kendall's tau of utilities with the levels of expertise, lowest first, [level, question]."""
    found = kendalltau(np.arange(len(levels)), levels.mean(axis=1)).statistic
    return float(found)
