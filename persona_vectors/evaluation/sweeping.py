"""Sweeps: which layer and strength to steer at, chosen on one set of questions and reported on another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import writing
from persona_vectors.data.intervals import mean_interval
from persona_vectors.data.ledger import Ledger
from persona_vectors.data.traits import Trait, as_trait
from persona_vectors.evaluation.answers import check_abstentions, check_given, number
from persona_vectors.evaluation.asks import Ask, keep_answers, open_ledger
from persona_vectors.evaluation.judge import Judge, judge_name
from persona_vectors.evaluation.likelihood import neutral_perplexity
from persona_vectors.evaluation.points import PLAIN, PROMPTED, Case, Point, Sweep, choose
from persona_vectors.model.blocks import Layer, Model, chosen_layers, model_name
from persona_vectors.model.identity import hash_of
from persona_vectors.model.thoughts import Span, edit_positions
from persona_vectors.steering.add import RowEdit
from persona_vectors.vectors.controls import random_vectors
from persona_vectors.vectors.directions import per_dose
from persona_vectors.vectors.vector import PersonaVector


def sweep(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait | str | Path,
    vector: PersonaVector,
    *,
    judge: Judge | None,
    layer: Layer,
    coefs: Sequence[float] | None = None,
    doses: Sequence[float] | None = None,
    controls: int = 10,
    samples: int = 3,
    first: int | None = None,
    gate: float = 50.0,
    positions: str = "all",
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
    trait's own instructions, the ceiling. `coefs` multiply the vector, `doses` are fractions of the residual norm;
    `positions` are those of `steer`, or a `Span`'s name. Reported are `samples` answers to each evaluation question,
    one where they are greedy, so that intervals hold over draws too; one to each `first` extraction question chooses.

    Answers and scores are kept in the JSONL file `out` as they come, by vector, layer, coefficient, system prompt,
    question and seed: a run that was killed, or a larger one, generates only what the file lacks.

    Raises InputError where no point is coherent, the judge scores nothing, or a stage lacks questions.
    """
    trait, judge = as_trait(trait), check_given(judge)
    layers, strengths = chosen_layers(layer, len(vector.directions)), _strengths(coefs, doses)
    chooses, reports = trait.questions.extract[:first], trait.questions.eval
    if not chooses or not reports:
        raise InputError(f"trait {trait.name!r} lacks questions to choose with (extract) or to report on (eval)")
    vector.check_fits(model)
    edit = partial(_edit, vector, doses is not None, edit_positions(tokenizer, positions))
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    with writing(out):
        judged = {"trait_hash": hash_of(trait.model_dump()), "judge": judge_name(judge)}
        ledger = open_ledger(out, model, tokenizer, {**judged, **sampling})
        runner = _Runner(model, tokenizer, trait, judge, seed, ledger)
        options = {**sampling, "batch_tokens": batch_tokens}
        grid: dict[Case, RowEdit | None] = {(trait.name, k, s): edit(k, s) for k in layers for s in strengths}
        points = runner.run("choose", {(PLAIN, None, 0.0): None, **grid}, chooses, 1, options)
        best = choose(points, trait.name, gate)
        place, strength = best.place, best.strength
        noise = random_vectors(model, tokenizer, vector, layer=place, count=controls, seed=seed)
        cases: dict[Case, RowEdit | None] = {(PLAIN, None, 0.0): None, (PROMPTED, None, 0.0): None}
        cases |= {(trait.name, place, s): edit(place, s) for s in sorted({*strengths, -strength})}
        cases |= {(v.trait, place, strength): edit(place, strength)._replace(vector=v) for v in noise}
        points += runner.run("report", cases, reports, samples if temperature else 1, options)
    facts = trait.name, model_name(model), judged["judge"], "coef" if doses is None else "dose"
    return Sweep(*facts, place, strength, best.coef, tuple(points), positions, gate)


def _edit(vector: PersonaVector, by_dose: bool, positions: str | Span, layer: int, strength: float) -> RowEdit:
    return RowEdit(vector, layer, strength * per_dose(vector, layer) if by_dose else strength, positions)


def _strengths(coefs: Sequence[float] | None, doses: Sequence[float] | None) -> list[float]:
    found = sorted({*(coefs if coefs is not None else doses or ())} - {0})
    if (coefs is None) == (doses is None) or not found or found[-1] <= 0:
        raise InputError("sweep needs either coefs= or doses= with a positive one among them")
    return found


@dataclass
class _Runner:
    model: Model
    tokenizer: PreTrainedTokenizerBase
    trait: Trait
    judge: Judge
    seed: int
    ledger: Ledger

    def run(
        self,
        stage: str,
        cases: dict[Case, RowEdit | None],
        questions: Sequence[str],
        samples: int,
        options: dict[str, Any],
    ) -> list[Point]:
        """Answer and judge every question in every case, as far as the ledger does not hold it; return the points."""
        asks, keys = [], []
        for (name, _, _), edit in cases.items():
            for index, question in enumerate(questions):
                pair = index % len(self.trait.instruction) if name == PROMPTED else -1
                system = self.trait.system_prompt("pos", pair) if name == PROMPTED else None
                asks += [Ask(question, system, edit, pair)] * samples
                keys += [self._key(asks[-1], self.seed + sample) for sample in range(samples)]
        options = {**options, "seed": int(hash_of([stage, self.seed]), 16) % 2**31, "rubric": self.trait.eval_prompt}
        options |= {"judge": self.judge, "desc": f"{self.trait.name}: {stage}", "facts": {"stage": stage}}
        found = keep_answers(self.model, self.tokenizer, asks, keys, self.ledger, **options)
        check_abstentions(self.judge, [entry["score"] for entry in found])
        perplexities = neutral_perplexity(self.model, self.tokenizer, list(cases.values()))
        size, points = len(questions) * samples, []
        plain = _by_question(found[:size], "score", samples)
        for i, ((name, layer, strength), edit) in enumerate(cases.items()):
            part = found[i * size : (i + 1) * size]
            scores = _by_question(part, "score", samples)
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
                    mean_interval(_by_question(part, "coherence", samples)),
                    mean_interval([[move] for move in moves]),
                    sum(move * sign < 0 for move in known) / len(known) if known else math.nan,
                    perplexities[i],
                    samples,
                )
            )
        return points

    def _key(self, ask: Ask, seed: int) -> str:
        return hash_of([ask.edit and ask.edit.told(), ask.system, ask.question, seed])


def _by_question(entries: Sequence[dict[str, Any]], name: str, samples: int) -> list[list[float]]:
    values = [number(entry[name]) for entry in entries]
    return [values[i : i + samples] for i in range(0, len(values), samples)]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
