"""What tests of persons say of respondents: two-parameter item response theory, and the agreement of raters."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


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
