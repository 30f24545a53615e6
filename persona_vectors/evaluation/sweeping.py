"""Sweeps: which layer and strength to steer at, chosen on one set of questions and reported on another."""

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.data.ledger import Ledger
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.answers import Ask, answer_batches, check_abstentions, number
from persona_vectors.evaluation.judge import Answer, Judge, judge_name
from persona_vectors.evaluation.judges import score_both
from persona_vectors.evaluation.likelihood import neutral_perplexity
from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.identity import hash_of, identity
from persona_vectors.steering.add import RowEdit
from persona_vectors.vectors.controls import random_vectors
from persona_vectors.vectors.directions import per_dose
from persona_vectors.vectors.vector import PersonaVector

Case = tuple[str, int | None, float]
"""A point's name, layer and strength."""
PLAIN, PROMPTED = "plain", "own system prompt"


@dataclass(frozen=True)
class Point:
    """What one vector, layer and strength did to the answers to one set of questions."""

    stage: str
    """"choose" (the extraction questions) or "report" (the evaluation questions)."""
    name: str
    """The trait, "plain", "own system prompt", "random 0" or "covariance 0"."""
    layer: int | None
    coef: float
    strength: float
    """As it was asked for: a coefficient or a dose."""
    score: Interval
    """The trait score, 0 to 100."""
    coherence: Interval
    effect: Interval
    """The trait score less the plain model's, question by question."""
    wrong_way: float
    """The share of questions that moved against the coefficient's sign."""
    perplexity: float
    """On plain facts, under the edit and without a system prompt."""


@dataclass(frozen=True)
class Sweep:
    """A chosen layer and strength, and every point: none of those that chose is among those that report."""

    trait: str
    model: str
    judge: str
    unit: str
    """What a strength is: "coef" or "dose"."""
    layer: int
    strength: float
    coef: float
    points: tuple[Point, ...]

    def stage(self, stage: str) -> list[Point]:
        """Return the points of "choose" or of "report"."""
        return [point for point in self.points if point.stage == stage]

    @property
    def controls(self) -> list[Point]:
        """The random vectors at the chosen layer and strength, on the evaluation questions."""
        return [p for p in self.stage("report") if p.name not in (self.trait, PLAIN, PROMPTED)]

    def save_csv(self, path: str | Path) -> None:
        """Write one row a point, whole or not at all."""
        rows = []
        for point in self.points:
            row = {"trait": self.trait, "model": self.model, "judge": self.judge, "unit": self.unit}
            for name, value in asdict(point).items():
                parts = value._asdict() if isinstance(value, Interval) else None
                row |= {f"{name}_{k}": v for k, v in parts.items()} if parts else {name: value}
            rows.append(row)
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def sweep(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    vector: PersonaVector,
    *,
    judge: Judge,
    layers: Sequence[int],
    coefs: Sequence[float] | None = None,
    doses: Sequence[float] | None = None,
    controls: int = 10,
    samples: int = 1,
    questions: int | None = None,
    gate: float = 50.0,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    out: str | Path | None = None,
) -> Sweep:
    """Steer at every layer and strength, choose the best on the extraction questions, report on the evaluation ones.

    Chosen is the positive strength with the highest mean trait score among the points whose mean coherence is at least
    `gate`. There the evaluation questions are answered: at every strength and at minus the chosen one, with `controls`
    random vectors of the same norm (half isotropic, half with the covariance of real activations), and under the
    trait's own instructions, the ceiling. `coefs` multiply the vector, `doses` are fractions of the residual norm.
    `questions` takes only the first ones of the extraction questions.

    Answers and scores are kept in the JSONL file `out` as they come, by vector, layer, coefficient, system prompt,
    question and seed: a run that was killed, or a larger one, generates only what the file lacks.

    Raises InputError where no point is coherent, the judge scores nothing, or a stage lacks questions.
    """
    strengths = sorted({*(coefs if coefs is not None else doses or ())} - {0})
    if (coefs is None) == (doses is None) or not strengths or strengths[-1] <= 0 or not layers:
        raise InputError("sweep needs layers=, and either coefs= or doses= with a positive one among them")
    chooses, reports = trait.questions.extract[:questions], trait.questions.eval
    if not chooses or not reports:
        raise InputError(f"trait {trait.name!r} lacks questions to choose with (extract) or to report on (eval)")
    vector.check_fits(*model_shape(model))

    def edit(vector: PersonaVector, layer: int, strength: float) -> RowEdit:
        return RowEdit(vector, layer, strength if doses is None else strength * per_dose(vector, layer))

    settings = {
        **identity(model, tokenizer),
        "trait_hash": hash_of(trait.model_dump()),
        "judge": judge_name(judge),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
    }
    runner = _Runner(model, tokenizer, trait, judge, samples, seed, Ledger(out, settings))
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "batch_tokens": batch_tokens}
    grid: dict[Case, RowEdit | None] = {
        (trait.name, layer, s): edit(vector, layer, s) for layer in layers for s in strengths
    }
    points = runner.run("choose", {(PLAIN, None, 0.0): None, **grid}, chooses, options)
    best = choose(points, trait.name, gate)
    assert best.layer is not None
    layer, strength = best.layer, best.strength
    noise = random_vectors(model, tokenizer, vector, layers=[layer], count=controls, seed=seed)
    cases: dict[Case, RowEdit | None] = {(PLAIN, None, 0.0): None, (PROMPTED, None, 0.0): None}
    cases |= {(trait.name, layer, s): edit(vector, layer, s) for s in sorted({*strengths, -strength})}
    cases |= {(each.trait, layer, strength): RowEdit(each, layer, best.coef) for each in noise}
    points += runner.run("report", cases, reports, options)
    unit = "coef" if doses is None else "dose"
    return Sweep(trait.name, settings["model"], judge_name(judge), unit, layer, strength, best.coef, tuple(points))


def choose(points: Sequence[Point], name: str, gate: float) -> Point:
    """Return the coherent point of positive strength with the highest trait score; see `sweep`."""
    positive = [p for p in points if p.name == name and p.strength > 0 and p.stage == "choose"]
    coherent = [p for p in positive if p.coherence.mean >= gate and not math.isnan(p.score.mean)]
    if not coherent:
        raise InputError(
            f"no layer and strength of {name!r} keeps the coherence at {gate:g} (the best has "
            f"{max(p.coherence.mean for p in positive):.1f}): give smaller strengths, or a lower gate"
        )
    return max(coherent, key=lambda p: p.score.mean)


@dataclass
class _Runner:
    model: Model
    tokenizer: PreTrainedTokenizerBase
    trait: Trait
    judge: Judge
    samples: int
    seed: int
    ledger: Ledger

    def run(
        self, stage: str, cases: dict[Case, RowEdit | None], questions: Sequence[str], options: dict[str, Any]
    ) -> list[Point]:
        """Answer and judge every question in every case, as far as the ledger does not hold it; return the points."""
        asks, keys = [], []
        for (name, _, _), edit in cases.items():
            for index, question in enumerate(questions):
                pair = index % len(self.trait.instruction) if name == PROMPTED else -1
                system = self.trait.system_prompt("pos", pair) if name == PROMPTED else None
                asks += [Ask(question, system, edit, pair)] * self.samples
                keys += [self._key(asks[-1], self.seed + sample) for sample in range(self.samples)]
        self._fill(stage, asks, keys, options)
        found = [self.ledger.found[key] for key in keys]
        check_abstentions(self.judge, [entry["score"] for entry in found])
        perplexities = neutral_perplexity(self.model, self.tokenizer, list(cases.values()))
        size, points = len(questions) * self.samples, []
        plain = _by_question(found[:size], "score", self.samples)
        for i, ((name, layer, strength), edit) in enumerate(cases.items()):
            part = found[i * size : (i + 1) * size]
            scores = _by_question(part, "score", self.samples)
            moves = [_mean(after) - _mean(before) for before, after in zip(plain, scores)]
            sign = math.copysign(1, strength)
            known = [move for move in moves if not math.isnan(move)]
            points.append(
                Point(
                    stage,
                    name,
                    layer,
                    edit.coef if edit else 0.0,
                    float(strength),
                    mean_interval(scores),
                    mean_interval(_by_question(part, "coherence", self.samples)),
                    mean_interval([[move] for move in moves]),
                    sum(move * sign < 0 for move in known) / len(known) if known else math.nan,
                    perplexities[i],
                )
            )
        return points

    def _fill(self, stage: str, asks: Sequence[Ask], keys: Sequence[str], options: dict[str, Any]) -> None:
        known = {i for i, key in enumerate(keys) if key in self.ledger.found}
        unjudged = [i for i in sorted(known) if "score" not in self.ledger.found[keys[i]]]
        seed = int(hash_of([stage, self.seed]), 16) % 2**31
        batches = answer_batches(self.model, self.tokenizer, asks, seed=seed, skip=known, **options)
        with tqdm(total=len(asks), initial=len(known), desc=f"{self.trait.name}: {stage}", unit="answer") as bar:
            self._judge(unjudged, asks, keys)
            for batch in batches:
                self.ledger.add({"key": keys[i], "stage": stage, **_describe(asks[i]), "answer": a} for i, a in batch)
                self._judge([i for i, _ in batch], asks, keys)
                bar.update(len(batch))

    def _judge(self, indices: Sequence[int], asks: Sequence[Ask], keys: Sequence[str]) -> None:
        answers = [Answer(asks[i].question, self.ledger.found[keys[i]]["answer"], asks[i].pair) for i in indices]
        if answers:
            scores = score_both(self.model, self.tokenizer, self.judge, answers, self.trait.eval_prompt)
            self.ledger.add(
                {"key": keys[i], "score": score, "coherence": coherence}
                for i, (score, coherence) in zip(indices, scores)
            )

    def _key(self, ask: Ask, seed: int) -> str:
        edit = ask.edit
        steered = (edit.vector.direction(edit.layer).tolist(), edit.layer, round(edit.coef, 6)) if edit else None
        return hash_of([steered, ask.system, ask.question, seed])


def _describe(ask: Ask) -> dict[str, Any]:
    """Return what a reader of the ledger wants to know of an answer."""
    edit = ask.edit
    steered = {"vector": edit.vector.trait, "layer": edit.layer, "coef": edit.coef} if edit else {}
    return {**steered, "system": ask.system, "question": ask.question}


def _by_question(entries: Sequence[dict[str, Any]], name: str, samples: int) -> list[list[float]]:
    values = [number(entry[name]) for entry in entries]
    return [values[i : i + samples] for i in range(0, len(values), samples)]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
