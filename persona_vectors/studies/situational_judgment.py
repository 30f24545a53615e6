"""Situational judgment: what a character would do, by forced choice, with item response theory.

Tests of situational judgment put a scene and several actions, one of which is the character's. Here an action is
chosen by its likelihood as an answer, the mean log-probability of its tokens, averaged over all orders in which the
actions are listed and over paraphrases of the question. Respondents are states of the model: steered with the first
vector at several strengths and with random vectors at the recommended one. Choices are fitted by the two-parameter
model, P(choice) = sigmoid(a_j (theta_i - b_j)), with theta from N(0, 1) integrated out (marginal maximum likelihood,
with normal priors of deviation 0.5 on log a and of 2 on b), and theta is its posterior mean. ICC is ICC(A,1):
absolute agreement of single paraphrases, two-way random effects (Shrout and Fleiss 1979, their ICC(2,1));
respondents by paraphrase, the value being the mean margin over scenes.

The paper: none in particular. Such tests come from the choice of staff, and are used on models as well; the method
is taken here, and no published number compared.

A small model can show whether a vector orders the respondents as its strength does; it cannot show what it would do
in a scene that it acts in.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from scipy.stats import spearmanr

from persona_vectors.data.intervals import bootstrap
from persona_vectors.evaluation.likelihood import forced_choice
from persona_vectors.evaluation.psychometrics import icc, two_parameter_fit
from persona_vectors.steering.add import RowEdit
from persona_vectors.studies.frame import Given, Line, shipped, upper

VECTORS = 1
STRENGTHS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
ASKED = ("What do you do?", "Which of these would you choose?")
SCENES: list[list[str]] = shipped("scenes")
"""Scenes, each with the action in character and another."""


def lines(given: Given) -> list[Line]:
    """Return how abilities follow the strength, and how paraphrases agree; `size` + 2 scenes, intervals over them."""
    scenes, own = SCENES[: given.size + 2], given.edits[0]
    edits = {f"{s:+g}": own._replace(coef=s * own.coef) for s in STRENGTHS}
    edits |= {f"random {i}": edit for i, edit in enumerate(given.random_edits(own, 10))}

    def chosen(scenes: Sequence[Sequence[str]], edit: RowEdit) -> list[list[float]]:
        return forced_choice(given.model, given.tokenizer, scenes, ASKED, edit=edit).tolist()

    found = np.array([given.once(name, chosen, scenes, edit) for name, edit in edits.items()])
    count, plain, full = len(STRENGTHS), STRENGTHS.index(0.0), STRENGTHS.index(1.0)
    rng, everyone = np.random.default_rng(given.seed), np.arange(len(scenes))
    over_scenes = partial(bootstrap, clusters=everyone, resamples=100)

    @cache
    def fitted(which: tuple[int, ...]) -> np.ndarray:
        return two_parameter_fit(torch.tensor(found.mean(axis=2)[:, which] > 0).float())[2].numpy()

    def theta(which: np.ndarray) -> np.ndarray:
        return fitted(tuple(sorted(which.tolist())))

    def share(which: np.ndarray) -> np.ndarray:
        return (found.mean(axis=2)[:, which] > 0).mean(axis=1)

    def difference(measure: Callable[[np.ndarray], np.ndarray], which: np.ndarray) -> float:
        return float(np.subtract(*measure(which)[[full, plain]]))

    def follows(which: np.ndarray) -> float:
        abilities = theta(which)[:count]
        return float(spearmanr(abilities, STRENGTHS).statistic) if np.ptp(abilities) > 1e-9 else math.nan

    def agreement(which: np.ndarray) -> float:
        return icc(found[:, which].mean(axis=1))

    ranks = [spearmanr(rng.permutation(count), STRENGTHS).statistic for _ in range(1000)]
    rated = found.mean(axis=1)
    shuffled = [icc(np.stack([rng.permutation(column) for column in rated.T], axis=1)) for _ in range(400)]
    ranked = upper(ranks, "shuffled ranks")
    result = [Line("Spearman's rho of ability with strength", over_scenes(follows), *ranked)]
    for name, measure in (("ability", theta), ("share chosen in character", share)):
        at = measure(everyone)
        moved = over_scenes(partial(difference, measure))
        null = float((at[count:] - at[plain]).max())
        result.append(Line(f"{name}, recommended strength less plain", moved, null, "largest of 10 random vectors"))
    chance = upper(shuffled, "shuffled respondents")
    return [*result, Line("ICC of paraphrases", over_scenes(agreement), *chance)]
