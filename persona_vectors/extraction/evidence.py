"""How reliable a difference of means is: halves of the questions, and held-out separation."""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor


def mean_difference(pos: Tensor, neg: Tensor) -> Tensor:
    return (pos.double().mean(dim=0) - neg.double().mean(dim=0)).float()


def split_half_cosine(
    pos: Float[Tensor, "pair layer hidden"], neg: Float[Tensor, "pair layer hidden"], question: Tensor, splits: int = 20
) -> Float[Tensor, " layer"] | None:
    """Return the cosine between the vectors of two random halves of the questions, averaged over splits.

    None with fewer than two questions.
    """
    count = int(question.max()) + 1
    if count < 2:
        return None
    generator, total = torch.Generator().manual_seed(0), torch.zeros(pos.shape[1], dtype=torch.float32)
    for _ in range(splits):
        first = torch.isin(question, torch.randperm(count, generator=generator)[: count // 2])
        a, b = (mean_difference(pos[mask], neg[mask]) for mask in (first, ~first))
        total += torch.nn.functional.cosine_similarity(a, b, dim=1)
    return total / splits


def separation(
    pos: Float[Tensor, "pair layer hidden"], neg: Float[Tensor, "pair layer hidden"], question: Tensor, folds: int = 5
) -> Float[Tensor, " layer"] | None:
    """Return the AUROC with which each fold of questions is told apart by the other folds' vector, averaged over folds.

    None with fewer than two questions.
    """
    from scipy.stats import mannwhitneyu

    count = int(question.max()) + 1
    if count < 2:
        return None
    areas = []
    for fold in range(min(folds, count)):
        held_out = question % min(folds, count) == fold
        direction = mean_difference(pos[~held_out], neg[~held_out])
        sides = [
            einsum(side[held_out], direction, "pair layer hidden, layer hidden -> pair layer").numpy()
            for side in (pos, neg)
        ]
        areas.append(mannwhitneyu(*sides, axis=0).statistic / len(sides[0]) ** 2)
    return torch.tensor(sum(areas) / len(areas), dtype=torch.float32)
