"""The evidence for a vector without a judge: its likelihood contrast beside random vectors and prompt paraphrases."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.data.texts import assistant_prompts
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.likelihood import State, Statements, likelihood_contrasts, neutral_perplexity
from persona_vectors.model.blocks import Model
from persona_vectors.steering.add import RowEdit
from persona_vectors.vectors.controls import random_vectors
from persona_vectors.vectors.directions import per_dose
from persona_vectors.vectors.vector import PersonaVector


@dataclass(frozen=True)
class ContrastEffect:
    """How far a vector moves the likelihood contrast on statements that did not choose its layer and dose.

    Effects are differences from the plain model, in nats a token.
    """

    trait: str
    layer: int
    dose: float
    edit: RowEdit
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
    layers: Sequence[int],
    doses: Sequence[float],
    trait: Trait | None = None,
    controls: int = 100,
    max_perplexity: float = 1.5,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> ContrastEffect:
    """Choose a layer and dose on the first statement pairs, and measure the effect on the others beside its controls.

    Chosen is the largest effect among the points at which the perplexity on plain facts is at most `max_perplexity`
    times the plain model's. The controls are steered with at the chosen point; they chose none of their own.

    Raises InputError where no point passes that gate.
    """
    choosing, reporting = statements.split()
    doses = [dose for dose in doses if dose > 0]
    grid = [RowEdit(vector, layer, dose * per_dose(vector, layer)) for layer in layers for dose in doses]
    if not grid:
        raise InputError("contrast_effect needs one layer and one positive dose, or more")
    if controls < 2:
        raise InputError(f"controls is {controls}: give 2 random vectors or more, half of them isotropic")
    plain, *perplexities = neutral_perplexity(model, tokenizer, [None, *grid])
    scores = likelihood_contrasts(model, tokenizer, choosing, [State(edit) for edit in grid], progress=progress)
    passing = [i for i, value in enumerate(perplexities) if value <= max_perplexity * plain]
    if not passing:
        raise InputError(
            f"every layer and dose of {vector.trait!r} takes the perplexity on plain facts above {max_perplexity:g} "
            f"times the plain {plain:.1f} (the least: {min(perplexities):.1f}): give smaller doses"
        )
    best = max(passing, key=lambda i: float(scores[i].mean()))
    chosen = grid[best]
    noise = random_vectors(model, tokenizer, vector, layers=[chosen.layer], count=controls, seed=seed)
    prompts = [trait.system_prompt("pos", pair) for pair in range(len(trait.instruction))] if trait else []
    groups = {
        "own": [State(), State(chosen), State(chosen._replace(coef=-chosen.coef))],
        "random": [State(RowEdit(control, chosen.layer, chosen.coef)) for control in noise],
        "band": [State(system=system) for system in assistant_prompts()],
        "prompted": [State(system=system) for system in prompts],
    }
    states = [state for group in groups.values() for state in group]
    found = likelihood_contrasts(model, tokenizer, reporting, states, progress=progress)
    effects = dict(zip(groups, (found - found[0]).split([len(group) for group in groups.values()])))
    return ContrastEffect(
        trait=vector.trait,
        layer=chosen.layer,
        dose=doses[best % len(doses)],
        edit=chosen,
        effect=by_pair(effects["own"][1]),
        flipped=by_pair(effects["own"][2]),
        random=tuple(effects["random"].mean(dim=1).tolist()),
        band=tuple(effects["band"].mean(dim=1).tolist()),
        prompted=by_pair(effects["prompted"].mean(dim=0)) if trait else None,
        perplexity=(plain, perplexities[best]),
    )


def effect_matrix(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[RowEdit],
    statements: Mapping[str, Statements],
) -> Float[Tensor, "edit trait"]:
    """Return the effect of every edit on every trait's likelihood contrast: is it this trait that a vector moves?"""
    columns = []
    for each in statements.values():
        _, reporting = each.split()
        found = likelihood_contrasts(model, tokenizer, reporting, [State(), *map(State, edits)])
        columns.append((found[1:] - found[0]).mean(dim=1))
    return torch.stack(columns, dim=1)


def by_pair(effects: Tensor) -> Interval:
    """Return the mean over statement pairs and its 95 % interval, resampling pairs."""
    return mean_interval([[value] for value in effects.tolist()])
