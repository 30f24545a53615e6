"""Which of two flagged datasets will move a trait more, where random directions cannot say so as well."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import import_pyarrow
from persona_vectors.data.intervals import Interval
from persona_vectors.evaluation.contrast import ContrastEffect
from persona_vectors.flagging.nulls import KEPT
from persona_vectors.flagging.parts import read_header
from persona_vectors.vectors.nulls import halves

SUBSAMPLES = 200
CHANCE = 0.02
"""The share of random directions that may tell two datasets apart as well as a vector that is given a verdict.

A vector carries more of what answers differ by than a random direction does: with .05, every eighth pair of datasets of
different sources, without any trait, got a verdict."""
Effects = str | Path | Sequence[Mapping[str, Any]]
"""Rows of `contrast_effect`, or a file of them."""


@dataclass(frozen=True)
class Comparison:
    """One vector's mean projection difference in two datasets, and which of them will move the trait more."""

    first: Interval
    second: Interval
    gap: Interval
    """First minus second, with its 95 % interval."""
    effect: float
    """The gap in standard deviations of a sample, both datasets' pooled."""
    null: tuple[float, ...]
    """The same of random directions: isotropic ones, then as many with the covariance of neutral answers."""
    reference: str | None
    """What the latter have the covariance of."""
    length: float
    """How often an answer of the first dataset is longer than one of the second, ties counted half: .5 is not apart."""
    alike: tuple[str, ...] = ()
    """The other vectors at its layer that tell the two datasets apart at least as well."""
    enough: int | None = None
    """How many samples of each give this verdict in 95 % of 200 random subsamples; None: no number up to the smaller
    dataset's, or no verdict."""
    moves: bool | None = None
    """Whether `contrast` found that the vector moves its trait; None: no evidence was given."""

    @property
    def chance(self) -> tuple[float, float]:
        """The shares of isotropic and of covariance directions that tell the two datasets apart as well.

        They are those of normal distributions with the spread that the random directions' effects have.
        """
        spreads = [np.sqrt((half**2).mean()) for half in halves(np.array(self.null))]
        first, second = (math.erfc(abs(self.effect) / (spread * math.sqrt(2))) if spread else 0.0 for spread in spreads)
        return first, second

    @property
    def verdict(self) -> str | None:
        """ "first" or "second", where the gap's interval leaves out zero and chance is below CHANCE for both kinds."""
        if not self.null or self.gap.low <= 0 <= self.gap.high or max(self.chance) >= CHANCE:
            return None
        return "first" if self.gap.mean > 0 else "second"

    def rows(self) -> list[dict[str, Any]]:
        """Return one row: both means, their gap, its null, and how many samples give the verdict."""
        row: dict[str, Any] = self.first.columns("first") | self.second.columns("second") | self.gap.columns("gap")
        shares = self.chance if self.null else (None, None)
        row |= {"effect": self.effect, "chance_isotropic": shares[0], "chance_covariance": shares[1]}
        row |= {"reference": self.reference, "length": self.length, "alike": list(self.alike)}
        return [row | {"verdict": self.verdict, "enough": self.enough, "moves": self.moves}]

    def __str__(self) -> str:
        text = (
            f"{self.first:+.2f} and {self.second:+.2f}, gap {self.gap:+.2f}, {self.effect:+.2f} standard deviations: "
        )
        if not self.null:
            text += "no verdict without a null: flag with controls=100"
        elif self.verdict:
            text += f"the {self.verdict} will move the trait more"
            text += f"; {self.enough} samples of each suffice" if self.enough else ""
            text += f" ({max(self.chance):.2%} of random directions tell them apart as well)"
        elif self.gap.low <= 0 <= self.gap.high:
            text += "no telling which moves the trait more"
        else:
            text += f"no verdict, {max(self.chance):.0%} of random directions tell these two datasets apart as well"
        apart = not self.gap.low <= 0 <= self.gap.high
        text += f"; {', '.join(self.alike)} tells them apart as well" if self.alike and apart else ""
        text += f"; by length alone {self.length:.2f}"
        return text + ("; contrast found no effect of this vector on this model" if self.moves is False else "")


class _Read(NamedTuple):
    """A file's differences on one vector, the hash of each one's prompt, and random directions' in some of its rows."""

    values: np.ndarray
    prompts: np.ndarray
    kept: np.ndarray
    """Which of the values the random directions were read for,"""
    controls: np.ndarray
    """and their differences, [kept, direction]."""
    lengths: np.ndarray


def compare_datasets(
    flags: str | Path, other: str | Path, *, effects: Effects | None = None, seed: int = 0
) -> dict[str, Comparison]:
    """Compare two flags files, vector by vector, with 95 % intervals clustered by prompt.

    Two datasets differ in topic, length and form too, and almost any direction tells them apart. A verdict is given
    only where the gap, in standard deviations of a sample, is larger than that of 98 % of the random directions that
    `flag` read beside the vector. Prompts that both files have count as the same clusters, so what they add to both
    cancels. Where both files come from one source the gap is the trait's; else read `length` and `alike` too.

    Raises InputError where they were made with other models, vectors, layers, baselines or controls.
    """
    paths = [Path(flags), Path(other)]
    headers = [read_header(path) for path in paths]
    for name in ("weights", "vectors", "layers", "baseline", "max_new_tokens", "controls", "controls_reference"):
        mine, theirs = (header["settings"].get(name) for header in headers)
        if mine != theirs:
            raise InputError(f"{flags} has {name}={mine!r} and {other} {theirs!r}: flag both with the same settings")
    settings, compared = headers[0]["settings"], {}
    for number, key in enumerate(headers[0]["summary"]):
        layer = settings["layers"][number // len(settings["vectors"])]
        controls = f"controls@{layer}" if settings.get("controls") else None
        sides = [_read(path, key, controls, seed) for path in paths]
        found = _compared(sides[0], sides[1], settings.get("controls_reference"))
        enough = _enough(sides, found, np.random.default_rng(seed)) if found.verdict else None
        compared[key] = found, enough
    sizes, moving = {key: abs(found.effect) for key, (found, _) in compared.items()}, _moving(effects)
    result = {}
    for key, (found, enough) in compared.items():
        at = key.partition("@")[2]
        others = {name: effect for name, effect in sizes.items() if name != key and name.partition("@")[2] == at}
        alike = tuple(name for name, effect in others.items() if effect >= sizes[key])
        moves = moving.get(key.partition("@")[0])
        result[key] = Comparison(**{**vars(found), "alike": alike, "enough": enough, "moves": moves})
    return result


def _moving(effects: Effects | None) -> dict[str, bool]:
    """Return which traits' vectors `contrast` found to work, of those that it was run for."""
    rows: Any = effects or []
    if isinstance(effects, str | Path):
        try:
            rows = json.loads(Path(effects).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {effects} ({error}): give what contrast --json wrote") from None
        rows = rows if isinstance(rows, list) else ContrastEffect.load(effects).rows()
    if not all(isinstance(row, Mapping) and "trait" in row and isinstance(row.get("works"), bool) for row in rows):
        raise InputError("effects are no rows of contrast_effect: give a trait and whether it works in each")
    return {row["trait"]: row["works"] for row in rows}


def _read(path: Path, key: str, controls: str | None, seed: int) -> _Read:
    _, parquet = import_pyarrow()
    parts: list[list[np.ndarray]] = []
    with parquet.ParquetFile(path) as file:
        total = file.metadata.num_rows
        chosen = np.zeros(total, bool)
        chosen[np.random.default_rng(seed).choice(total, min(total, KEPT), replace=False)] = True
        names, place = [f"{key}_difference", "prompt_hash", "answer_tokens", *filter(None, [controls])], 0
        for batch in file.iter_batches(batch_size=4096, columns=names):
            values = batch.column(0).to_numpy(zero_copy_only=False).astype(np.float32)
            there, mine = ~np.isnan(values), chosen[place : place + len(values)]
            prompts = np.array([int(text, 16) for text in batch.column(1).to_pylist()], np.uint64)
            random = np.zeros((len(values), 0), np.float32)
            if controls:
                random = batch.column(3).flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
            lengths = batch.column(2).to_numpy(zero_copy_only=False)
            parts.append([values[there], prompts[there], mine[there], random[there & mine], lengths[there]])
            place += len(values)
    joined = [np.concatenate(arrays) for arrays in zip(*parts)] if parts else [np.zeros(0)] * 5
    if len(joined[0]) < 2:
        raise InputError(f"{path} has {len(joined[0])} samples with a difference: give two or more")
    return _Read(joined[0], joined[1], joined[2].nonzero()[0], joined[3], joined[4])


def _compared(one: _Read, two: _Read, reference: str | None) -> Comparison:
    effect = float(_effects(one.values[:, None], two.values[:, None])[0])
    null, longer = tuple(_effects(one.controls, two.controls).tolist()), _longer(one.lengths, two.lengths)
    return Comparison(_interval(one), _interval(two), _interval(one, two), effect, null, reference, longer)


def _effects(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Return each direction's gap in pooled standard deviations, from differences [sample, direction]."""
    spread = np.sqrt((one.var(axis=0, ddof=1) + two.var(axis=0, ddof=1)) / 2)
    gap = one.mean(axis=0, dtype=np.float64) - two.mean(axis=0, dtype=np.float64)
    return gap / np.where(spread == 0, np.inf, spread)


def _interval(one: _Read, two: _Read | None = None) -> Interval:
    """Return a dataset's mean, or the first's less the second's, where samples of one prompt are one cluster."""
    from scipy.stats import t

    sides = [(1.0, one)] if two is None else [(1.0, one), (-1.0, two)]
    mean = sum(sign * float(side.values.mean(dtype=np.float64)) for sign, side in sides)
    parts = [sign * (side.values - side.values.mean(dtype=np.float64)) / len(side.values) for sign, side in sides]
    clusters = np.unique(np.concatenate([side.prompts for _, side in sides]), return_inverse=True)[1]
    sums = np.bincount(clusters, np.concatenate(parts))
    if len(sums) < 2:
        return Interval(mean, math.nan, math.nan)
    reach = float(t.ppf(0.975, len(sums) - 1) * np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)))
    return Interval(mean, mean - reach, mean + reach)


def _longer(one: np.ndarray, two: np.ndarray) -> float:
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(one, two).statistic / len(one) / len(two))


def _enough(sides: list[_Read], found: Comparison, rng: np.random.Generator) -> int | None:
    size, smallest = 4, min(len(side.kept) for side in sides)
    while size <= smallest:
        drawn = [[_some(side, size, rng) for side in sides] for _ in range(SUBSAMPLES)]
        verdicts = [_compared(one, two, None).verdict for one, two in drawn]
        if verdicts.count(found.verdict) >= 0.95 * SUBSAMPLES:
            return size
        size = max(size + 1, round(size * 1.3))
    return None


def _some(side: _Read, size: int, rng: np.random.Generator) -> _Read:
    """Return a random part of a file's rows."""
    drawn = rng.choice(len(side.kept), size, replace=False)
    rows = side.kept[drawn]
    return _Read(side.values[rows], side.prompts[rows], np.arange(size), side.controls[drawn], side.lengths[rows])
