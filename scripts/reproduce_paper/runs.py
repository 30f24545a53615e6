"""The training runs: each set, and each intervention on the negative one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from persona_vectors.model.pooling import pool
from persona_vectors.steering.add import steer
from persona_vectors.steering.bounds import ablate
from persona_vectors.training.watch import penalize
from persona_vectors.vectors.controls import random_vector
from reproduce_paper.study import PLAIN, Study


@dataclass
class Run:
    """One training run."""

    kind: str
    data: str
    """The mixture that it trains on."""
    seed: int
    edit: Callable[[Any], AbstractContextManager[None]]
    """Given the trainer, returns what its training runs inside."""

    @property
    def name(self) -> str:
        return f"{self.kind} seed {self.seed}"


def make_runs(
    study: Study, mixtures: Sequence[str], seeds: int, intervention_seeds: int, where: int, coefs: Sequence[float]
) -> list[Run]:
    """Return the runs of each mixture and seed, and each intervention's on the negative set, at the layer `where`."""
    vector = study.vector
    runs: list[Run] = []
    for name in mixtures:
        for seed in range(seeds):
            runs.append(Run(PLAIN if name == "negative" else f"set {name}", name, seed, lambda _: nullcontext()))
    options: dict[str, Any] = {"layer": where, "during": "training"}
    direction = vector.directions[where] / vector.directions[where].norm()
    usual = float((pool(study.model, study.neutral).means[:, 0, where] @ direction).mean())  # the penalty's target
    for seed in range(intervention_seeds):
        for coef in coefs:
            edit = lambda _, c=coef: steer(study.model, vector, coef=c, **options)  # noqa: E731
            runs.append(Run(f"preventative {coef:g}", "negative", seed, edit))
            control = random_vector(vector, seed=seed)
            edit = lambda _, c=coef, v=control: steer(study.model, v, coef=c, **options)  # noqa: E731
            runs.append(Run(f"random vector {coef:g}", "negative", seed, edit))
        runs.append(Run("CAFT", "negative", seed, lambda _: ablate(study.model, vector, **options)))
        for weight in (0.001, 0.01):
            edit = lambda t, w=weight: penalize(t, vector, layer=where, weight=w, target=usual)  # noqa: E731
            runs.append(Run(f"penalty {weight:g}", "negative", seed, edit))
    return sorted(runs, key=lambda run: (run.seed, run.data != "negative"))
