"""Atomic fidelity: whether every sentence of an answer is in character, and again when asked again.

Shin et al. 2025 (arXiv 2506.19352). Each sentence has a score; here VADER's compound sentiment, -1 to 1, and being
in character is a score above 0.05, VADER's own bound of positive. With these definitions, ours where the paper's
could not be had: ACC is the share of an answer's sentences that are in character. IC = 1 - the standard deviation of
an answer's scores over the largest that the range allows, half its width. RC = 1 - the mean earth mover's distance
between the sentence scores of two answers to one question over the range's width. An answer whose mean is in
character may have half of its sentences outside: the last lines count how many such answers there are.

The paper: scores of whole answers overlook sentences out of character; how well a character is kept depends on the
task and on how desirable it is.

A small model can show whether steering moves every sentence or a few; it cannot show a character that holds over a
long text.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from persona_vectors.data.traits import load_trait
from persona_vectors.evaluation import fidelity
from persona_vectors.evaluation.judges import SentimentJudge
from persona_vectors.model.generation import generate_batches
from persona_vectors.model.prompts import chat_prompt, decode, encode
from persona_vectors.steering.add import RowEdit, steer_rows
from persona_vectors.studies.frame import Given, Line, over

VECTORS = 1


def scored(given: Given, questions: Sequence[str], edit: RowEdit | None) -> list[list[list[float]]]:
    """Return the sentence scores of two answers to each question, [question][answer][sentence]."""
    prompts = [encode(given.tokenizer, chat_prompt(given.tokenizer, q)) for q in questions for _ in range(2)]
    options: dict[str, Any] = {"max_new_tokens": 56, "seed": given.seed}
    texts, judge = [""] * len(prompts), SentimentJudge()

    def during(rows: list[int]) -> Any:
        return steer_rows(given.model, [edit] * len(rows))

    for batch in generate_batches(given.model, given.tokenizer, prompts, during=during, **options):
        for row, (tokens, _) in zip(batch.rows, batch.answers):
            texts[row] = decode(given.tokenizer, tokens)
    scores = [[judge.compound(sentence) for sentence in fidelity.sentences(text)] or [0.0] for text in texts]
    return [scores[i : i + 2] for i in range(0, len(scores), 2)]


def lines(given: Given) -> list[Line]:
    """Return ACC, IC and RC, plain, steered, and with random vectors; `size` + 2 questions, answered twice each."""
    questions = load_trait("optimistic").questions.eval[: given.size + 2]
    edits = {"plain": None, "steered": given.edits[0]}
    edits |= {f"random {i}": edit for i, edit in enumerate(given.random_edits(given.edits[0], 4))}
    found = {name: given.once(name, scored, given, questions, edit) for name, edit in edits.items()}
    measures: dict[str, Callable[[Sequence[Sequence[float]]], float]] = {
        "ACC": partial(fidelity.over_answers, fidelity.accuracy),
        "IC": partial(fidelity.over_answers, fidelity.internal_consistency),
        "RC": fidelity.retest_consistency,
        "in character by the mean, with sentences outside": partial(fidelity.over_answers, fidelity.hidden_deviation),
    }
    result = []
    for name, measure in measures.items():
        values = {edit: [measure(answers) for answers in read] for edit, read in found.items()}
        moved = np.subtract(values["steered"], values["plain"])
        randoms = [np.subtract(values[edit], values["plain"]).mean() for edit in list(values)[2:]]
        result += [Line(f"{name}, plain", over(values["plain"])), Line(f"{name}, steered", over(values["steered"]))]
        extreme = float(max(randoms, key=abs))
        result.append(Line(f"{name}, steered less plain", over(moved), extreme, "furthest of 4 random vectors"))
    return result
