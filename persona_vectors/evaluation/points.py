"""What a sweep finds: points, and the chosen one."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.intervals import Interval
from persona_vectors.data.tables import Table
from persona_vectors.vectors.uses import Use, coherent_range

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
    samples: int = 1
    """How many answers to each question."""

    @property
    def place(self) -> int:
        """The layer of a point that is steered."""
        assert self.layer is not None
        return self.layer

    def row(self) -> dict[str, Any]:
        """Return the point as a row of a table."""
        found: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            found |= value.columns(name) if isinstance(value, Interval) else {name: value}
        return found


@dataclass(frozen=True)
class Sweep(Table):
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
    positions: str = "all"
    """Where the vectors were added: see `steer`."""
    gate: float = 50.0
    """The least mean coherence of the points that could be chosen."""

    @property
    def works(self) -> bool:
        """Whether the chosen point's interval lies above zero, and its mean above every random vector's."""
        return bool(self.controls) and self.chosen.effect.low > 0 and self.chosen.effect.mean > self._null

    @property
    def chosen(self) -> Point:
        """The chosen layer and strength on the evaluation questions."""
        (found,) = [p for p in self.stage("report") if (p.name, p.strength) == (self.trait, self.strength)]
        return found

    @property
    def _null(self) -> float:
        return max((point.effect.mean for point in self.controls), default=math.nan)

    def use(self, *, source: str = "pv.sweep") -> Use:
        """Return what the vector's file keeps: see `PersonaVector.with_use`."""
        tried = [p for p in self.stage("choose") if p.name == self.trait and p.layer == self.layer]
        return Use(
            "steer",
            self.layer,
            measure=f"trait score (0 to 100; judge: {self.judge})",
            effect=self.chosen.effect,
            null=self._null if self.controls else None,
            null_of=f"the largest of {len(self.controls)} random vectors",
            evidence=self.works,
            model=self.model,
            source=source,
            coef=self.coef,
            coherent=coherent_range({p.coef: p.coherence.mean >= self.gate for p in tried}),
            positions=self.positions,
        )

    def stage(self, stage: str) -> list[Point]:
        """Return the points of "choose" or of "report"."""
        return [point for point in self.points if point.stage == stage]

    @property
    def controls(self) -> list[Point]:
        """The random vectors at the chosen layer and strength, on the evaluation questions."""
        return [p for p in self.stage("report") if p.name not in (self.trait, PLAIN, PROMPTED)]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a point; an interval is three columns: score, score_low, score_high."""
        shared = {"trait": self.trait, "model": self.model, "judge": self.judge, "unit": self.unit}
        shared["positions"] = self.positions
        return [shared | point.row() for point in self.points]

    def save_csv(self, path: str | Path) -> None:
        """Write one row a point, whole or not at all."""
        rows = self.rows()
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


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
