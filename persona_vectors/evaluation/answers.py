"""Evaluation: answers of a plain, steered or prompted model, scored, with intervals clustered by question."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import writing
from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.data.ledger import Ledger
from persona_vectors.data.tables import Table
from persona_vectors.data.traits import Trait, as_trait
from persona_vectors.evaluation.asks import Ask, keep_answers, open_ledger
from persona_vectors.evaluation.judge import Judge, judge_name
from persona_vectors.evaluation.served import Generate
from persona_vectors.model.blocks import Model
from persona_vectors.model.identity import hash_of
from persona_vectors.steering.add import RowEdit
from persona_vectors.vectors.vector import PersonaVector


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
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    options |= {"batch_tokens": batch_tokens, "desc": f"{vector.trait}: steered answers"}
    keys = [str(place) for place in range(len(asks))]
    found = keep_answers(model, tokenizer, asks, keys, Ledger(None), judge=None, rubric="", **options)
    answers = [entry["answer"] for entry in found]
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

    def __repr__(self) -> str:
        means = f"score {self.score:.1f}, coherence {self.coherence:.1f}"
        counts = f"{len(self.answers)} answers, {self.abstained} not scored"
        return f"Evaluation({self.trait!r}: {means}; {counts}; judge: {self.judge})"

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
    out: str | Path | None = None,
) -> Evaluation:
    """Answer the trait's evaluation questions and have the answers judged.

    It is the model as it stands that answers: inside `with pv.steer(...)` or `pv.cap(...)` the edited one, while the
    judge reads the plain one. `questions` replaces the trait's own; each gets `samples` answers, so that
    the intervals hold over draws as well as over questions. Greedy answers are all alike, and one is taken. With
    `generate`, say an `OpenAIGenerator`, the answers come from there. Answers and scores are kept in the JSONL file
    `out` as they come: a run that was killed goes on there. Each edit of the model needs a file of its own.

    Raises InputError where there is no question, for `generate` inside an edit, where the judge abstained on every
    answer, and where `out` holds answers of another model, edit or setting.
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
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    facts = {"trait_hash": hash_of(trait.model_dump()), "judge": judge_name(judge), **options}
    facts["generate"] = generate and judge_name(generate)
    options |= {"batch_tokens": batch_tokens, "generate": generate}
    with writing(out):
        ledger = open_ledger(out, model, tokenizer, facts)
        keys = [hash_of([ask.system, ask.question, place]) for place, ask in enumerate(asks)]
        judged: dict[str, Any] = {"judge": judge, "rubric": trait.eval_prompt, "desc": f"{trait.name}: answers"}
        found = keep_answers(model, tokenizer, asks, keys, ledger, **judged, **options)
    scored = tuple(Scored(ask.question, *(e[n] for n in Scored._fields[1:])) for ask, e in zip(asks, found))
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
