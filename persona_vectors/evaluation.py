"""Evaluation: answers under steering, scored, with intervals clustered by question."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from persona_vectors.models import Model, batch_tokens_for, chat_prompt, decode, encode, generate_tokens, length_batches
from persona_vectors.steering import steer
from persona_vectors.vectors import PersonaVector


class Interval(NamedTuple):
    """A mean with the bounds of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def mean_interval(by_question: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """Return the mean over questions and its 95 % interval, resampling whole questions.

    `by_question` holds, for each question, the scores of its answers; nan scores are left out.
    """
    from scipy.stats import bootstrap

    means = np.array([np.nanmean(scores) for scores in by_question if not np.all(np.isnan(scores))])
    if len(means) < 2:
        return Interval(float(means.mean()) if len(means) else float("nan"), float("nan"), float("nan"))
    if np.ptp(means) == 0:
        return Interval(*(float(means[0]),) * 3)
    rng = np.random.default_rng(seed)
    low, high = bootstrap((means,), np.mean, n_resamples=5000, method="percentile", rng=rng).confidence_interval
    return Interval(float(means.mean()), float(low), float(high))


def correlation_interval(
    x: Sequence[float], y: Sequence[float], questions: Sequence[int], *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """Return Pearson's r of x and y and its 95 % bootstrap interval, resampling whole questions.

    `questions` says which question each point is from; points with nan on either side are left out.
    """
    points = np.stack([x, y]).astype(float)
    known = ~np.isnan(points).any(axis=0)
    points, labels = points[:, known], np.asarray(questions)[known]
    groups = [points[:, labels == label] for label in np.unique(labels)]
    rng = np.random.default_rng(seed)
    drawn = [
        _pearson(np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))], axis=1))
        for _ in range(resamples)
    ]
    return Interval(_pearson(points), *map(float, np.nanquantile(drawn, [0.025, 0.975])))


def _pearson(points: np.ndarray) -> float:
    """Return the correlation of two rows; nan where one of them does not vary."""
    centred = points - points.mean(axis=1, keepdims=True)
    size = np.sqrt((centred**2).sum(axis=1)).prod()
    return float((centred[0] * centred[1]).sum() / size) if size > 0 else float("nan")


def steered_answers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    questions: Sequence[str],
    *,
    layer: int,
    coefs: Sequence[float],
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[list[str]]:
    """Return the answers to every question at every coefficient, [coef][question].

    Coefficients share batches, one a row. `progress` is called with the number of answers made after each batch.
    """
    tasks = [(coef, question) for coef in coefs for question in questions]
    prompts = [encode(tokenizer, chat_prompt(tokenizer, question)) for _, question in tasks]
    budget = batch_tokens or 8 * batch_tokens_for(model)
    answers = [""] * len(tasks)
    for number, batch in enumerate(length_batches(prompts, max_new_tokens, budget)):
        with steer(model, vector, layer=layer, coef=torch.tensor([float(tasks[i][0]) for i in batch])):
            rows = generate_tokens(
                model,
                tokenizer,
                [prompts[i] for i in batch],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed + number,
            )
        for i, (tokens, _) in zip(batch, rows):
            answers[i] = decode(tokenizer, tokens)
        if progress:
            progress(len(batch))
    return [answers[i : i + len(questions)] for i in range(0, len(tasks), len(questions))]
