"""Fidelity by sentence: whether every sentence of an answer is in character, and again when asked again.

After Shin et al. 2025 (arXiv 2506.19352), their ACC, IC and RC as far as its abstract defines them.
"""

import re
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from scipy.stats import wasserstein_distance

WIDTH, TARGET = 2.0, 0.05
"""Of VADER's compound sentiment: the range's width, and what a sentence has to score to be positive."""


def accuracy(scores: Sequence[float], low: float = TARGET, high: float = 1.0) -> float:
    """Return ACC, the share of sentences whose score lies in the character's range."""
    return float(np.mean([low <= score <= high for score in scores]))


def internal_consistency(scores: Sequence[float], width: float = WIDTH) -> float:
    """Return IC: 1 where all sentences score the same, 0 where half of them are at either end of the range."""
    return float(1 - np.std(scores) / (width / 2))


def retest_consistency(answers: Sequence[Sequence[float]], width: float = WIDTH) -> float:
    """Return RC: 1 where all answers to a question have the same scores in any order, 0 at a range's distance."""
    return float(1 - np.mean([wasserstein_distance(a, b) for a, b in combinations(answers, 2)]) / width)


def hidden_deviation(scores: Sequence[float]) -> float:
    """Return 1 for an answer whose mean is in character and one or more of whose sentences are not, else 0."""
    return float(np.mean(scores) >= TARGET and accuracy(scores) < 1)


def sentences(text: str) -> list[str]:
    """Return a text's sentences; one that the limit of tokens cut counts where it is all that there is."""
    found = [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if re.search(r"\w", part)]
    return found[:-1] if len(found) > 1 and found[-1][-1] not in '.!?"' else found


def over_answers(measure: Callable[[Sequence[float]], float], answers: Sequence[Sequence[float]]) -> float:
    """Return the mean of a measure over the answers to a question."""
    return float(np.mean([measure(scores) for scores in answers]))
