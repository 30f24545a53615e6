"""What each set and each intervention came to over all seeds, with intervals by question."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.evaluation.judge import Answer, score
from persona_vectors.evaluation.judges import PerplexityJudge
from reproduce_paper.runs import Run
from reproduce_paper.sets import CONTROL, INOCULATION
from reproduce_paper.study import PLAIN, POST_HOC, RANDOM, Study


@dataclass
class Outcome:
    """What one intervention came to over all seeds, question by question."""

    name: str
    scores: list[list[float]]
    """[question][sample of any seed]"""
    shifts: list[list[float]]
    coherence: float
    neutral_loss: float
    means: list[float]
    """Each run's mean trait score."""

    def less(self, other: "Outcome") -> Interval:
        """Return the difference of the trait scores, paired by question."""
        return mean_interval([[float(np.mean(a) - np.mean(b))] for a, b in zip(self.scores, other.scores)])


def outcome(study: Study, name: str, seeds: Sequence[dict[str, Any]], shifts: Sequence[list[float]]) -> Outcome:
    """Gather the measurements of all seeds; `shifts` are each seed's by question."""
    n, scores, coherent = study.samples, [[] for _ in study.questions], []
    for found in seeds:
        for i, values in enumerate(scores):
            values += found["score"][i * n : (i + 1) * n]
        answers = [Answer(study.questions[i // n], text) for i, text in enumerate(found["answers"])]
        coherent += score(PerplexityJudge(study.model, study.tokenizer), answers, "")
    loss = float(np.mean([found["neutral_loss"] for found in seeds]))
    means = [float(np.mean(found["score"])) for found in seeds]
    coherence = float(np.mean([c or 0.0 for c in coherent]))
    return Outcome(name, scores, [list(q) for q in zip(*shifts)], coherence, loss, means)


def gather(study: Study, runs: Sequence[Run], base: Sequence[tuple[dict[str, Any], Tensor]]) -> list[Outcome]:
    """Return the outcomes over all seeds: the base model's, each set's and each intervention's on the negative set."""
    unit = study.vector.directions[study.layer] / study.vector.directions[study.layer].norm()
    outcomes = [outcome(study, "base model", [found for found, _ in base], [[0.0] * len(study.questions)])]
    for kind in dict.fromkeys(run.kind for run in runs):
        read = [study.read(run.name) for run in runs if run.kind == kind]
        shifts = [((states - base[0][1])[:, study.layer] @ unit).tolist() for _, states in read]
        outcomes.append(outcome(study, kind, [found for found, _ in read], shifts))
        for coef, random in product(POST_HOC if kind == PLAIN else (), ("", RANDOM)):
            name = f"post-hoc {coef:g}{random}"
            keys = [f"{name} {i}" for i in range(len(study.controls))] if random else [name]
            outcomes.append(outcome(study, name, [found[key] for key in keys for found, _ in read], []))
    return outcomes


def set_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the table's lines: the base model, and what training on each set comes to."""
    return [
        {
            "trained on": {PLAIN: "negative"}.get(o.name, o.name.removeprefix("set ")),
            "VADER [95 %]": str(mean_interval(o.scores)),
            "less base model": str(o.less(outcomes[0])),
            "shift [95 %]": str(mean_interval(o.shifts)),
            "coherence": o.coherence,
            "neutral loss": o.neutral_loss,
        }
        for o in outcomes
    ]


def intervention_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the table's lines, with the share that each intervention gives back of the fall that plain training makes.

    The share is left out where the fall's interval holds 0. The control of a vector is the random ones in its place,
    and that of inoculation the prompts that do not ask for what the set shows.
    """
    named = {o.name: o for o in outcomes}
    controls = {o.name: named.get(CONTROL if o.name == INOCULATION else o.name + RANDOM) for o in outcomes}
    plain = named[PLAIN]
    fall = outcomes[0].less(plain)
    return [
        {
            "intervention": o.name,
            "VADER [95 %]": str(mean_interval(o.scores)),
            "less plain training": str(o.less(plain)),
            "share of the fall": o.less(plain).mean / fall.mean if fall.low > 0 else "",
            "less its control": str(o.less(control)) if (control := controls[o.name]) else "",
            "runs: least, most": f"{min(o.means):+.2f}, {max(o.means):+.2f}",
            "coherence": o.coherence,
            "neutral loss": o.neutral_loss,
            "shift [95 %]": str(mean_interval(o.shifts)) if o.shifts else "",
        }
        for o in outcomes
    ]
