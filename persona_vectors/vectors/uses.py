"""Use: where a vector is recommended for one purpose, and the evidence that it is."""

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from persona_vectors.data.checks import first_fault
from persona_vectors.data.errors import InputError
from persona_vectors.data.intervals import Interval

MAKES = {
    "steer": "persona-vectors contrast MODEL VECTOR --store",
    "monitor": "persona-vectors flag MODEL VECTOR --baseline none --labels COLUMN --store",
    "flag": "persona-vectors flag MODEL VECTOR --labels COLUMN --store",
}
"""Each purpose, and a command that measures a vector for it."""


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


@dataclass(frozen=True)
class Use:
    """The best layer that was found for one purpose, and whether there is evidence that the vector works there.

    Without evidence it is no recommendation: it says what was tried, and what random vectors did.
    """

    purpose: str
    """"steer", "monitor" or "flag"."""
    layer: int
    measure: str
    """What `effect` is, with its unit."""
    effect: Interval
    null: float | None
    """What random vectors reach in the same measure, None where none were tried,"""
    null_of: str
    """and which of them do: "the largest of 100 random vectors"."""
    evidence: bool
    model: str
    source: str
    """The command, or the function, that measured it."""
    coef: float | None = None
    """What to steer with, times the vector."""
    coherent: tuple[float, float] | None = None
    """The least and the largest coefficient at that layer up to which the model stayed coherent. None: unknown."""
    positions: str = "all"
    date: str = field(default_factory=_today)

    def __post_init__(self) -> None:
        if self.purpose not in MAKES:
            raise InputError(f"purpose is {self.purpose!r}: give one of {', '.join(MAKES)}")

    @property
    def place(self) -> str:
        """The layer, and for steering the coefficient, in words."""
        coef = "" if self.coef is None else f", coef {self.coef:+.3g}"
        return f"layer {self.layer}{coef}{'' if self.positions == 'all' else f', positions {self.positions}'}"

    @property
    def finding(self) -> str:
        """The effect beside its null, in words."""
        form = "+.3g" if self.purpose == "steer" else ".3g"
        null = "no random vectors" if self.null is None else f"{self.null:{form}}, {self.null_of}"
        return f"{self.measure} {self.effect:{form}} beside {null}"

    def __str__(self) -> str:
        made = f"{self.finding} ({self.source}, {self.date})"
        if not self.evidence:
            return f"{self.purpose}: no recommendation; at {self.place}, {made}"
        span = "" if self.coherent is None else f", coherent from {self.coherent[0]:+.3g} to {self.coherent[1]:+.3g}"
        return f"{self.purpose}: {self.place}{span}: {made}"


def recommended(uses: Mapping[str, Use], purpose: str, of: str) -> Use:
    """Return the use for a purpose; raises InputError where nothing is recommended, naming the command that measures.

    `of` is what has the uses, in words.
    """
    use = uses.get(purpose)
    if use is None:
        raise InputError(f"{of} stores no layer to {purpose} at: give a layer, or measure one, {MAKES[purpose]}")
    if not use.evidence:
        raise InputError(
            f"{of} has no recommendation to {purpose}, at its best layer, {use.layer}, {use.finding}: "
            f"give a layer of your own, or measure again, {MAKES[purpose]}"
        )
    return use


def coherent_range(tried: Mapping[float, bool]) -> tuple[float, float]:
    """Return how far down and up from 0 every coefficient that was tried is coherent."""
    ends = []
    for sign in (-1, 1):
        end = 0.0
        for coef in sorted((c for c in tried if c * sign > 0), key=abs):
            if not tried[coef]:
                break
            end = coef
        ends.append(end)
    return ends[0], ends[1]


def to_json(uses: Mapping[str, Use]) -> dict[str, Any]:
    """Return uses as plain values."""
    return {purpose: asdict(uses[purpose]) for purpose in MAKES if purpose in uses}


def from_json(found: Any, path: Path) -> dict[str, Use]:
    """Return the uses that the file `path` holds; raises InputError where they are not whole."""
    try:
        return TypeAdapter(dict[str, Use]).validate_python(found)
    except ValidationError as error:
        raise InputError(f"{path} holds a broken recommended use: {first_fault(error)}; get the file again") from None
