"""The evidence for a vector without a judge: its likelihood contrast beside random vectors and prompt paraphrases."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import writing
from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.data.ledger import Ledger
from persona_vectors.data.tables import Table
from persona_vectors.data.texts import assistant_prompts
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.asks import open_ledger
from persona_vectors.evaluation.likelihood import State, Statements, likelihood_contrasts, neutral_perplexity
from persona_vectors.model.blocks import Layer, Model, chosen_layers, model_name
from persona_vectors.model.thoughts import SPANS
from persona_vectors.steering.add import RowEdit
from persona_vectors.vectors.controls import random_vectors
from persona_vectors.vectors.directions import per_dose
from persona_vectors.vectors.uses import Use, coherent_range
from persona_vectors.vectors.vector import PersonaVector


@dataclass(frozen=True)
class ContrastEffect(Table):
    """How far a vector moves the likelihood contrast on statements that did not choose its layer and dose.

    Effects are differences from the plain model, in nats a token.
    """

    trait: str
    layer: int
    dose: float
    coef: float
    """What the dose is, as a multiple of the vector."""
    effect: Interval
    flipped: Interval
    """The effect of minus the vector."""
    random: tuple[float, ...]
    """The effects of random vectors of the same norm at the same layer, isotropic ones first."""
    band: tuple[float, ...]
    """The effects of system prompts that mean "You are a helpful assistant.", and of the empty one."""
    prompted: Interval | None
    """The effect of the trait's own positive instructions as system prompts: the ceiling. None without a trait."""
    perplexity: tuple[float, float]
    """On plain facts: of the plain model and under the vector."""
    positions: str = "all"
    """Where the vectors were added: see `steer`."""
    coherent: tuple[float, float] | None = None
    """The least and the largest coefficient at that layer up to which all that were tried keep the perplexity."""
    model: str = "unknown"

    def use(self, *, source: str = "pv.contrast_effect") -> Use:
        """Return what the vector's file keeps: see `PersonaVector.with_use`."""
        return Use(
            "steer",
            self.layer,
            measure="likelihood contrast (nats a token)",
            effect=self.effect,
            null=max(self.random),
            null_of=f"the largest of {len(self.random)} random vectors",
            evidence=self.works,
            model=self.model,
            source=source,
            coef=self.coef,
            coherent=self.coherent,
            positions=self.positions,
        )

    def edit(self, vector: PersonaVector) -> RowEdit:
        """Return the chosen edit, of the vector that this is the effect of."""
        return RowEdit(vector, self.layer, self.coef, self.positions)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row: the chosen edit, its effect, and what it is held against."""
        row: dict[str, Any] = {"trait": self.trait, "layer": self.layer, "dose": self.dose, "coef": self.coef}
        row["positions"] = self.positions
        row |= self.effect.columns("effect") | self.flipped.columns("flipped")
        row |= {"random_max": max(self.random), "beaten": self.beaten}
        row |= {"band_min": min(self.band), "band_max": max(self.band)}
        unknown = Interval(math.nan, math.nan, math.nan)
        row |= (self.prompted or unknown).columns("own_prompt")
        row |= dict(zip(("perplexity_plain", "perplexity"), self.perplexity))
        return [row | {"works": self.works}]

    @property
    def beaten(self) -> float:
        """The share of the random vectors whose effect is smaller."""
        return sum(value < self.effect.mean for value in self.random) / len(self.random)

    @property
    def works(self) -> bool:
        """Whether the effect's interval lies above zero, and its mean above every random vector and the whole band."""
        return self.effect.low > 0 and self.effect.mean > max(*self.random, *self.band)


def contrast_effect(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    statements: Statements,
    *,
    layer: Layer,
    doses: Sequence[float],
    trait: Trait | None = None,
    controls: int = 100,
    max_perplexity: float = 1.5,
    positions: str = "all",
    seed: int = 0,
    out: str | Path | None = None,
) -> ContrastEffect:
    """Choose a layer and dose on the first statement pairs, and measure the effect on the others beside its controls.

    Chosen is the largest effect among the points at which the perplexity on plain facts is at most `max_perplexity`
    times the plain model's. The controls are steered with at the chosen point; they chose none of their own.
    `positions` are those of `steer`. What was read is kept in the JSONL file `out`, where a killed run goes on.

    Raises InputError where no point passes that gate, and where `out` is another model's.
    """
    choosing, reporting = statements.split()
    doses, layers = [float(dose) for dose in doses if dose > 0], chosen_layers(layer, len(vector.directions))
    _check(doses, controls, positions)
    grid = [RowEdit(vector, k, dose * per_dose(vector, k), positions) for k in layers for dose in doses]
    own = [State(system=trait.system_prompt("pos", i)) for i in range(len(trait.instruction))] if trait else []
    with writing(out):
        ledger = open_ledger(out, model, tokenizer, {})
        best, perplexity, kept = _best(model, tokenizer, choosing, grid, max_perplexity, ledger)
        chosen, dose = grid[best], doses[best % len(doses)]
        noise = random_vectors(model, tokenizer, vector, layer=chosen.layer, count=controls, seed=seed)
        groups = {
            "own": [State(), State(chosen), State(chosen._replace(coef=-chosen.coef))],
            "random": [State(RowEdit(control, chosen.layer, chosen.coef, positions)) for control in noise],
            "band": [State(system=system) for system in assistant_prompts()],
            "prompted": own,
        }
        options: dict[str, Any] = {"desc": f"{vector.trait}: beside controls", "ledger": ledger}
        found = likelihood_contrasts(model, tokenizer, reporting, list(chain(*groups.values())), **options)
    effects = dict(zip(groups, (found - found[0]).split([len(group) for group in groups.values()])))
    return ContrastEffect(
        trait=vector.trait,
        layer=int(chosen.layer),
        dose=dose,
        coef=chosen.coef,
        positions=positions,
        effect=by_pair(effects["own"][1]),
        flipped=by_pair(effects["own"][2]),
        random=tuple(effects["random"].mean(dim=1).tolist()),
        band=tuple(effects["band"].mean(dim=1).tolist()),
        prompted=by_pair(effects["prompted"].mean(dim=0)) if trait else None,
        perplexity=perplexity,
        coherent=coherent_range({e.coef: ok for e, ok in zip(grid, kept) if e.layer == chosen.layer}),
        model=model_name(model),
    )


def _check(doses: Sequence[float], controls: int, positions: str) -> None:
    if not doses:
        raise InputError("contrast_effect needs one layer and one positive dose, or more")
    if controls < 2:
        raise InputError(f"controls is {controls}: give 2 random vectors or more, half of them isotropic")
    if positions in SPANS:
        raise InputError(f"positions is {positions!r}: statements hold no reasoning; give all, prompt or response")


def _best(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    statements: Statements,
    grid: Sequence[RowEdit],
    max_perplexity: float,
    ledger: Ledger,
) -> tuple[int, tuple[float, float], list[bool]]:
    """Return the edit of the largest effect that keeps the perplexity, as an index, both perplexities, and which do."""
    plain, *perplexities = neutral_perplexity(model, tokenizer, [None, *grid], ledger=ledger)
    trait, states = grid[0].vector.trait, [State(edit) for edit in grid]
    options: dict[str, Any] = {"desc": f"{trait}: layers and doses", "ledger": ledger}
    scores = likelihood_contrasts(model, tokenizer, statements, states, **options)
    kept = [value <= max_perplexity * plain for value in perplexities]
    passing = [i for i, keeps in enumerate(kept) if keeps]
    if not passing:
        raise InputError(
            f"every layer and dose of {trait!r} takes the perplexity on plain facts above {max_perplexity:g} "
            f"times the plain {plain:.1f} (the least: {min(perplexities):.1f}): give smaller doses"
        )
    best = max(passing, key=lambda i: float(scores[i].mean()))
    return best, (plain, perplexities[best]), kept


def effect_matrix(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[RowEdit],
    statements: Mapping[str, Statements],
    *,
    out: str | Path | None = None,
) -> Float[Tensor, "edit trait"]:
    """Return the effect of every edit on every trait's likelihood contrast: is it this trait that a vector moves?"""
    columns, states = [], [State(), *map(State, edits)]
    with writing(out):
        ledger = open_ledger(out, model, tokenizer, {})
        for name, each in statements.items():
            _, reporting = each.split()
            desc = f"each vector on {name}"
            found = likelihood_contrasts(model, tokenizer, reporting, states, desc=desc, ledger=ledger)
            columns.append((found[1:] - found[0]).mean(dim=1))
    return torch.stack(columns, dim=1)


def by_pair(effects: Tensor) -> Interval:
    """Return the mean over statement pairs and its 95 % interval, resampling pairs."""
    return mean_interval([[value] for value in effects.tolist()])
