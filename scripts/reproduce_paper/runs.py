"""The training runs: each set, and each intervention on the negative one, with the vector and with random ones."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from persona_vectors.model.pooling import pool
from persona_vectors.steering.add import steer
from persona_vectors.steering.bounds import ablate
from persona_vectors.training.watch import penalize
from persona_vectors.vectors.vector import PersonaVector
from reproduce_paper.sets import CONTROL, INOCULATION
from reproduce_paper.study import PLAIN, RANDOM, Study

Edit = Callable[[Any], AbstractContextManager[None]]
"""Given the trainer, returns what its training runs inside."""


@dataclass
class Run:
    """One training run."""

    kind: str
    data: str
    """The mixture that it trains on."""
    seed: int
    edit: Edit
    control: int | None = None
    """Which random vector it has in the place of the persona vector."""

    @property
    def name(self) -> str:
        number = "" if self.control is None else f" {self.control}"
        return f"{self.kind}{number} seed {self.seed}"


def make_runs(
    study: Study,
    mixtures: Sequence[str],
    seeds: int,
    intervention_seeds: int,
    where: int,
    coefs: Sequence[float],
    weights: Sequence[float],
) -> list[Run]:
    """Return the runs of each mixture and seed, and each intervention's on the negative set, at the layer `where`."""
    runs: list[Run] = []
    for name in mixtures:
        for seed in range(seeds):
            runs.append(Run(PLAIN if name == "negative" else f"set {name}", name, seed, lambda _: nullcontext()))
    for name, edit in interventions(study, where, coefs, weights).items():
        for seed in range(intervention_seeds):
            runs.append(Run(name, "negative", seed, lambda t, e=edit: e(t, study.vector)))
        for i, control in enumerate(study.controls):
            chosen = lambda t, e=edit, v=control: e(t, v)  # noqa: E731
            runs.append(Run(name + RANDOM, "negative", i % intervention_seeds, chosen, control=i))
    for name in (INOCULATION, CONTROL):  # the prompt is there in training, and not when the model is asked
        runs += [Run(name, name, seed, lambda _: nullcontext()) for seed in range(intervention_seeds)]
    return sorted(runs, key=lambda run: (run.seed, run.data != "negative"))


def interventions(
    study: Study, where: int, coefs: Sequence[float], weights: Sequence[float]
) -> dict[str, Callable[[Any, PersonaVector], AbstractContextManager[None]]]:
    """Return what is done in training with a vector, by name."""
    options: dict[str, Any] = {"layer": where, "during": "training"}
    usual = pool(study.model, study.neutral).means[:, 0, where].mean(dim=0)  # the penalty's target is on this

    def penalty(trainer: Any, vector: PersonaVector, weight: float) -> AbstractContextManager[None]:
        target = float(usual @ vector.directions[where] / vector.directions[where].norm())
        return penalize(trainer, vector, layer=where, weight=weight, target=target)

    found: dict[str, Any] = {}
    for coef in coefs:
        found[f"preventative {coef:g}"] = lambda _, v, c=coef: steer(study.model, v, coef=c, **options)
    found["CAFT"] = lambda _, v: ablate(study.model, v, **options)
    for weight in weights:
        found[f"penalty {weight:g}"] = lambda t, v, w=weight: penalty(t, v, w)
    return found
