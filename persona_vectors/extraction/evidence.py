"""The difference of means, and how reliable it is: halves of the questions, and held-out questions."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

SPLITS, FOLDS = 20, 5
Pairs = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Gives the means of the positive and the negative answer of each pair in turn, both [layer, hidden]."""
Direction = Callable[[Bool[Tensor, " question"]], Float[Tensor, "layer hidden"]]
"""Gives the difference of means over the pairs of some questions."""


def evidence(pairs: Pairs, question: Int[Tensor, " pair"]) -> dict[str, Tensor]:
    """Return `directions`, [layer, hidden], and from two questions on `split_half_cosine` and `separation`, [layer].

    `pairs()` is called twice, and nothing is kept but a sum for each question. `question` numbers each pair's question,
    from 0.
    """
    direction, questions = difference(pairs, question), int(question.max()) + 1
    found = {"directions": direction(torch.ones(questions, dtype=torch.bool))}
    if questions > 1:
        found["split_half_cosine"] = split_half_cosine(direction, questions)
        found["separation"] = agreement(other_questions(direction, questions), pairs, question)["separation"]
    return found


def difference(pairs: Pairs, question: Int[Tensor, " pair"]) -> Direction:
    """Return what gives the difference of means over any questions; the pairs are read once."""
    per_question = question.bincount()
    sums = torch.zeros(0)
    for (pos, neg), number in zip(pairs(), question.tolist()):
        if not len(sums):
            sums = torch.zeros(len(per_question), *pos.shape, dtype=torch.float64)
        sums[number].add_(pos).sub_(neg)

    def direction(chosen: Bool[Tensor, " question"]) -> Float[Tensor, "layer hidden"]:
        total = chosen.double() @ sums.flatten(start_dim=1)
        return (total / per_question[chosen].sum()).float().view(sums.shape[1:])

    return direction


def split_half_cosine(direction: Direction, questions: int) -> Float[Tensor, " layer"]:
    """Return the cosine between the vectors of two random halves of the questions, averaged over splits."""
    generator, cosines = torch.Generator().manual_seed(0), []
    for _ in range(SPLITS):
        first = torch.isin(torch.arange(questions), torch.randperm(questions, generator=generator)[: questions // 2])
        cosines.append(torch.nn.functional.cosine_similarity(direction(first), direction(~first), dim=1))
    return torch.stack(cosines).mean(dim=0)


def other_questions(direction: Direction, questions: int) -> list[Float[Tensor, "layer hidden"]]:
    """Return a vector for each fold, of the other folds' questions; question q is in fold q modulo their number."""
    numbers = torch.arange(questions)
    folds = min(FOLDS, questions)
    return [direction(numbers % folds != fold) for fold in range(folds)]


def agreement(
    along: Sequence[Float[Tensor, "layer hidden"]], pairs: Pairs, question: Int[Tensor, " pair"]
) -> dict[str, Float[Tensor, " layer"]]:
    """Return how far pairs agree with a vector, which is `along[q % len(along)]` for those of question q.

    `separation`: the AUROC of positive against negative answers on the vector, averaged over the folds of questions.
    `pair_cosine`: the mean cosine of the pairs' differences with it. `wrong_way`: the share of questions whose pairs'
    differences point against it, taken together.
    """
    from scipy.stats import mannwhitneyu

    layers, folds = len(along[0]), len(along)
    projections = np.empty((len(question), 2, layers), np.float32)
    cosines, moved = np.zeros(layers), np.zeros((int(question.max()) + 1, layers))
    for line, (pos, neg), number in zip(projections, pairs(), question.tolist()):
        vector, step = along[number % folds], pos - neg
        for place, side in enumerate((pos, neg)):
            line[place] = einsum(side, vector, "layer hidden, layer hidden -> layer").numpy()
        moved[number] += einsum(step, vector, "layer hidden, layer hidden -> layer").numpy()
        cosines += torch.nn.functional.cosine_similarity(step, vector, dim=1).numpy() / len(question)
    areas = []
    for fold in range(folds):
        pos, neg = projections[(question % folds == fold).numpy()].swapaxes(0, 1)
        areas.append(mannwhitneyu(pos, neg, axis=0).statistic / len(pos) ** 2)
    found = {"separation": sum(areas) / folds, "pair_cosine": cosines, "wrong_way": (moved < 0).mean(axis=0)}
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in found.items()}
