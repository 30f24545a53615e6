"""What random directions say of a dataset, beside what a vector says of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.tables import Stored, Table
from persona_vectors.model.blocks import Model
from persona_vectors.vectors.controls import Null, random_null
from persona_vectors.vectors.moments import Moments, neutral_moments
from persona_vectors.vectors.vector import PersonaVector


def halves(null: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the effects of the isotropic random directions, the first half, and those of the others."""
    half = len(null) - len(null) // 2
    return null[:half], null[half:]


def beaten(effect: float, null: np.ndarray) -> tuple[float, float]:
    """Return the shares of isotropic random directions and of the others with a smaller effect, whatever its sign."""
    isotropic, other = (float((np.abs(half) < abs(effect)).mean()) for half in halves(null))
    return isotropic, other


class Spread:
    """Running means and deviations of a layer's random directions; the first half isotropic."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(0), np.zeros(0)

    def add(self, values: np.ndarray) -> None:
        """Take in [row, direction]; rows with no value are left out."""
        values = values[~np.isnan(values).any(axis=1)].astype(np.float64)
        if not len(values) or not values.shape[1]:
            return
        if not self.count:
            self.mean, self.squares = np.zeros(values.shape[1]), np.zeros(values.shape[1])
        middle, weight = values.mean(axis=0), self.count * len(values) / (self.count + len(values))
        self.squares += ((values - middle) ** 2).sum(axis=0) + weight * (middle - self.mean) ** 2
        self.count += len(values)
        self.mean += (middle - self.mean) * len(values) / self.count

    @property
    def effects(self) -> np.ndarray:
        """Each direction's mean in its own standard deviations, [direction]; empty with fewer than two rows."""
        if self.count < 2:
            return np.zeros(0)
        deviation = np.sqrt(self.squares / (self.count - 1))
        return self.mean / np.where(deviation == 0, np.inf, deviation)


def effects(values: Float[Tensor, "row column"]) -> Float[Tensor, " column"]:
    """Return each column's mean in its own standard deviations; nan where nothing varies."""
    spread = Spread()
    spread.add(values.numpy())
    if spread.count < 2:
        return torch.full_like(values[0], torch.nan)
    return torch.from_numpy(np.where(spread.squares > 0, spread.effects, np.nan)).float()


class Place(NamedTuple):
    """A vector's mean in its own standard deviations, and where it lies among those of random directions."""

    effect: float
    beaten_isotropic: float
    """The share of isotropic random directions with a mean nearer to zero; nan where there is no effect."""
    beaten_covariance: float
    """The same of those with the covariance of a reference."""


@dataclass(frozen=True, eq=False)
class Nulls(Table):
    """Means over rows along vectors, and along random directions that were read beside them.

    All are in their own standard deviations over the rows, so that directions along which everything varies more, or
    is longer, are not ahead for that.
    """

    traits: tuple[str, ...]
    layers: tuple[int, ...]
    poolings: tuple[str, ...]
    own: Annotated[Float[Tensor, "pooling layer vector"], Stored[0], Stored[1]]
    """The vectors' effects; nan where nothing varies: fewer than two rows, or all alike."""
    random: Annotated[Float[Tensor, "pooling layer direction"], Stored[0], Stored[1]]
    """The random directions'; the first half are isotropic, the others have the covariance of the reference."""
    reference: str
    """What the others have the covariance of."""

    def place(self, trait: str, *, layer: int | None = None, pooling: str = "response_mean") -> Place:
        """Return where a vector lies among random directions of the same layer, which one read layer need not say.

        Raises InputError for a trait, a layer or a pooling that was not read.
        """
        layer = self.layers[0] if layer is None and len(self.layers) == 1 else layer
        name, level = self._number("traits", trait), self._number("layers", layer)
        way = self._number("poolings", pooling)
        effect, null = float(self.own[way, level, name]), self.random[way, level].numpy()
        return Place(effect, *(beaten(effect, null) if effect == effect else (np.nan, np.nan)))

    def over_layers(self, trait: str, *, pooling: str = "response_mean") -> dict[str, Null]:
        """Return where a vector lies at its best layer among each kind, "isotropic" and "covariance".

        Each random direction is taken at its own best layer; they are drawn anew at every layer, so they have, if
        anything, more freedom than a vector has.
        """
        way, name = self._number("poolings", pooling), self._number("traits", trait)
        found = {}
        for kind, half in zip(("isotropic", "covariance"), halves(self.random[way].T.numpy())):
            null = random_null(self.own[way, :, name].abs(), torch.from_numpy(half).abs())
            found[kind] = null._replace(layer=self.layers[null.layer])
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each vector, layer and pooling that has an effect."""
        named = [(t, k, p) for k in self.layers for t in self.traits for p in self.poolings]
        found = [
            {"trait": trait, "layer": layer, "pooling": pooling}
            | self.place(trait, layer=layer, pooling=pooling)._asdict()
            for trait, layer, pooling in named
        ]
        return [row for row in found if row["effect"] == row["effect"]]

    def __repr__(self) -> str:
        count = self.random.shape[2]
        lines = [f"Nulls({count} random directions, half with the covariance of {self.reference})"]
        for row in self.rows():
            shares = f"{row['beaten_isotropic']:.0%} and {row['beaten_covariance']:.0%} of them"
            effect = f"{row['effect']:+.2f} standard deviations, further from zero than {shares}"
            lines.append(f"  {row['trait']} at layer {row['layer']}, {row['pooling']}: {effect}")
        return "\n".join(lines)

    def _number(self, kind: str, name: Any) -> int:
        known = getattr(self, kind)
        if name not in known:
            raise InputError(f"no random directions stand beside {name!r}: the {kind} are {', '.join(map(str, known))}")
        return known.index(name)


def with_nulls(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Sequence[PersonaVector],
    *,
    layers: Sequence[int],
    controls: int,
    reference: Moments | None,
) -> tuple[list[PersonaVector], str]:
    """Return the vectors with `controls` random directions behind them, and what half of these have the covariance of.

    Raises InputError for fewer than 20, and for a reference of another model or without one of the layers.
    """
    if not controls:
        return list(vectors), ""
    if controls < 20:
        raise InputError(f"controls is {controls}: give 20 random directions or more, or 0 for none")
    known = reference or neutral_moments(model, tokenizer, layer=layers)
    known.check_fits(vectors[0])
    for layer in layers:
        known.at(layer)
    drawn = known.random_vectors(vectors[0], count=controls)
    return [*vectors, *(replace(null, trait=f"null {i}") for i, null in enumerate(drawn))], known.source


def vectors_alone(values: Float[Tensor, "*rows column"], *, vectors: int, layers: int) -> Float[Tensor, "*rows key"]:
    """Return the vectors' values, of what was read for `with_nulls` at each layer."""
    return values.unflatten(-1, (layers, -1))[..., :vectors].flatten(-2)


def nulls_of(
    values: Float[Tensor, "row pooling column"],
    *,
    traits: Sequence[str],
    layers: Sequence[int],
    poolings: Sequence[str],
    reference: str,
) -> Nulls | None:
    """Return what the random directions say, of what was read for `with_nulls` at each layer; None without them."""
    found = torch.stack([effects(part) for part in values.unbind(dim=1)]).unflatten(1, (len(layers), -1))
    own, random = found[..., : len(traits)], found[..., len(traits) :]
    return Nulls(tuple(traits), tuple(layers), tuple(poolings), own, random, reference) if random.shape[2] else None
