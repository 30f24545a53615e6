"""Evaluation: answers of a plain, steered or prompted model, scored, with intervals clustered by question."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.data.progress import bar
from persona_vectors.data.tables import Table
from persona_vectors.data.traits import Trait, as_trait
from persona_vectors.evaluation.beside import score_batches
from persona_vectors.evaluation.judge import Answer, Judge, is_remote, judge_name
from persona_vectors.evaluation.judges import score_both
from persona_vectors.evaluation.served import Generate, served_answers
from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import generate_batches
from persona_vectors.model.prompts import chat_prompt, decode, encode
from persona_vectors.steering.add import RowEdit, steer_rows
from persona_vectors.vectors.vector import PersonaVector


class Ask(NamedTuple):
    """A question to answer, under a system prompt and a row edit or none."""

    question: str
    system: str | None = None
    edit: RowEdit | None = None
    pair: int = -1
    """The instruction pair that the system prompt is from, so that a judge can leave it out."""


def answer_batches(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    asks: Sequence[Ask],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    skip: Collection[int] = (),
    generate: Generate | None = None,
) -> Iterator[list[tuple[int, str]]]:
    """Yield answers batch by batch, each with the index of what was asked. Different edits share batches.

    `skip` holds indices that need no answer. Whatever is skipped, the batches and their seeds stay the same. With
    `generate` the answers come from there, without edits.
    """
    prompts = [encode(tokenizer, chat_prompt(tokenizer, ask.question, system=ask.system)) for ask in asks]
    if generate is not None:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        for served in served_answers(generate, model, tokenizer, prompts, skip=skip, **options):
            yield [(item.row, item.text) for item in served]
        return
    for batch in generate_batches(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_tokens=batch_tokens,
        skip=skip,
        during=lambda rows: steer_rows(model, [asks[i].edit for i in rows]),
    ):
        yield [(i, decode(tokenizer, tokens)) for i, (tokens, _) in zip(batch.rows, batch.answers)]


def _shown(batches: Iterator[list[tuple[int, str]]], count: int, desc: str) -> Iterator[list[tuple[int, str]]]:
    with bar(desc=desc, unit="answer", total=count) as done:
        for batch in batches:
            yield batch
            done.update(len(batch))


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
) -> list[list[str]]:
    """Return the answers to every question at every coefficient, [coef][question]. Coefficients share batches."""
    asks = [Ask(question, edit=RowEdit(vector, layer, coef)) for coef in coefs for question in questions]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    batches = answer_batches(model, tokenizer, asks, seed=seed, batch_tokens=batch_tokens, **options)
    found = dict(chain(*_shown(batches, len(asks), f"{vector.trait}: steered answers")))
    answers = [found[i] for i in range(len(asks))]
    return [answers[i : i + len(questions)] for i in range(0, len(asks), len(questions))]


class Scored(NamedTuple):
    """An answer with its scores, 0 to 100; None where the judge abstained."""

    question: str
    answer: str
    score: float | None
    coherence: float | None


@dataclass(frozen=True)
class Evaluation(Table):
    """How a model answers a trait's evaluation questions: mean scores, 0 to 100, with intervals by question."""

    trait: str
    judge: str
    score: Interval
    coherence: Interval
    answers: tuple[Scored, ...]
    """Those to one question stand together."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row an answer: question, answer, score and coherence."""
        return [answer._asdict() for answer in self.answers]

    @property
    def abstained(self) -> int:
        """How many answers the judge did not score: refusals, or no clear number."""
        return sum(answer.score is None for answer in self.answers)


def evaluate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait | str | Path,
    *,
    judge: Judge | None,
    questions: Sequence[str] | None = None,
    samples: int = 3,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    generate: Generate | None = None,
) -> Evaluation:
    """Answer the trait's evaluation questions and have the answers judged.

    It is the model as it stands that answers: inside `with pv.steer(...)` or `pv.cap(...)` the edited one, while the
    judge reads the plain one. `questions` replaces the trait's own; each gets `samples` answers, so that
    the intervals hold over draws as well as over questions. Greedy answers are all alike, and one is taken. With
    `generate`, say an `OpenAIGenerator`, the answers come from there.

    Raises InputError where there is no question, for `generate` inside an edit, and where the judge abstained on every
    answer.
    """
    trait, judge = as_trait(trait), check_given(judge)
    given = [questions] if isinstance(questions, str) else questions
    asked = trait.questions.eval if given is None else tuple(given)
    if not asked or samples < 1:
        raise InputError(
            f"trait {trait.name!r} has no questions to evaluate on: add questions.eval, or give questions="
        )
    samples = samples if temperature else 1
    asks = [Ask(question, system) for question in asked for _ in range(samples)]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "generate": generate}
    batches = answer_batches(model, tokenizer, asks, seed=seed, batch_tokens=batch_tokens, **options)
    shown: Iterable[list[tuple[int, str]]] = _shown(batches, len(asks), f"{trait.name}: answers")
    remote = is_remote(judge)
    found: dict[int, Scored] = {}

    def scores_of(batch: list[tuple[int, str]]) -> list[Scored]:
        answers = [Answer(asks[i].question, answer) for i, answer in batch]
        both = score_both(model, tokenizer, judge, answers, trait.eval_prompt)
        return [Scored(*answer[:2], *scores) for answer, scores in zip(answers, both)]

    def keep(batch: list[tuple[int, str]], scores: list[Scored]) -> None:
        found.update(zip((i for i, _ in batch), scores))

    score_batches(shown if remote else [list(chain(*shown))], scores_of, keep, remote=remote)
    scored = tuple(found[i] for i in range(len(asks)))
    check_abstentions(judge, [answer.score for answer in scored])
    by_question = [scored[i : i + samples] for i in range(0, len(scored), samples)]
    return Evaluation(
        trait.name,
        judge_name(judge),
        mean_interval([[number(answer.score) for answer in group] for group in by_question]),
        mean_interval([[number(answer.coherence) for answer in group] for group in by_question]),
        scored,
    )


def check_given(judge: Judge | None) -> Judge:
    """Return the judge; raises InputError where a verb that scores answers is given none."""
    if judge is None:
        raise InputError("judge is None, and answers are to be scored: give a judge, such as SentimentJudge()")
    return judge


def check_abstentions(judge: Judge, scores: Sequence[float | None]) -> None:
    """Raise InputError where the judge scored nothing at all."""
    if scores and all(value is None for value in scores):
        raise InputError(
            f"the judge {judge_name(judge)!r} abstained on all {len(scores)} answers: check its rubric on one answer "
            "by hand, or take another judge"
        )


def number(value: float | None) -> float:
    """Return a score as `mean_interval` takes it: nan where the judge abstained."""
    return math.nan if value is None else value
