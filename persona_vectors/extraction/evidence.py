"""The difference of means, and how reliable it is: halves of the questions, and held-out separation."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

SPLITS, FOLDS = 20, 5


def evidence(pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]], question: Int[Tensor, " pair"]) -> dict[str, Tensor]:
    """Return `directions`, [layer, hidden], and from two questions on `split_half_cosine` and `separation`, [layer].

    `pairs()` gives the means of the positive and the negative answer, both [layer, hidden], of each pair in turn. It is
    called twice, and nothing is kept but a sum for each question. `question` numbers each pair's question, from 0.
    """
    per_question = question.bincount()
    sums = torch.zeros(0)
    for (pos, neg), number in zip(pairs(), question.tolist()):
        if not len(sums):
            sums = torch.zeros(len(per_question), *pos.shape, dtype=torch.float64)
        sums[number].add_(pos).sub_(neg)

    def direction(chosen: Bool[Tensor, " question"]) -> Float[Tensor, "layer hidden"]:
        total = chosen.double() @ sums.flatten(start_dim=1)
        return (total / per_question[chosen].sum()).float().view(sums.shape[1:])

    found = {"directions": direction(per_question >= 0)}
    if len(per_question) > 1:
        found["split_half_cosine"] = _split_half_cosine(direction, len(per_question))
        found["separation"] = _separation(direction, pairs, question)
    return found


def _split_half_cosine(direction: Callable[[Tensor], Tensor], questions: int) -> Float[Tensor, " layer"]:
    """Return the cosine between the vectors of two random halves of the questions, averaged over splits."""
    generator, cosines = torch.Generator().manual_seed(0), []
    for _ in range(SPLITS):
        first = torch.isin(torch.arange(questions), torch.randperm(questions, generator=generator)[: questions // 2])
        cosines.append(torch.nn.functional.cosine_similarity(direction(first), direction(~first), dim=1))
    return torch.stack(cosines).mean(dim=0)


def _separation(
    direction: Callable[[Tensor], Tensor],
    pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    question: Int[Tensor, " pair"],
) -> Float[Tensor, " layer"]:
    """Return the AUROC with which each fold of questions is told apart by the other folds' vector, over the folds."""
    from scipy.stats import mannwhitneyu

    numbers = torch.arange(int(question.max()) + 1)
    folds = min(FOLDS, len(numbers))
    along = [direction(numbers % folds != fold) for fold in range(folds)]
    projections = np.empty((len(question), 2, len(along[0])), np.float32)
    for line, pair, fold in zip(projections, pairs(), (question % folds).tolist()):
        for place, side in enumerate(pair):
            line[place] = einsum(side, along[fold], "layer hidden, layer hidden -> layer").numpy()
    areas = []
    for fold in range(folds):
        pos, neg = projections[(question % folds == fold).numpy()].swapaxes(0, 1)
        areas.append(mannwhitneyu(pos, neg, axis=0).statistic / len(pos) ** 2)
    return torch.tensor(sum(areas) / len(areas), dtype=torch.float32)
