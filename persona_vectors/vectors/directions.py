"""Which layers and directions are meant, and projections on them."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, SupportsIndex, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Layer, Model, chosen_layers
from persona_vectors.vectors.shipped import VectorLike, as_vector
from persona_vectors.vectors.vector import PersonaVector

Key = str
"""A vector's trait, "evil"; with its layer, "evil@13", where several layers are read."""
Strength = float | Tensor | Callable[[], float]
"""A number, one for each row [batch], or a function that is asked in every forward pass."""
S = TypeVar("S", bound=Strength)


def vector_keys(names: Sequence[str], layers: Sequence[int]) -> list[Key]:
    """Return the names under which values are found: traits, or "trait@layer" where there are several layers."""
    return list(names) if len(layers) == 1 else [f"{name}@{layer}" for layer in layers for name in names]


def vector_list(vectors: VectorLike | Sequence[VectorLike]) -> list[PersonaVector]:
    """Return one vector, or several, as a list; raises InputError for what is none."""
    one = isinstance(vectors, (PersonaVector, str, Path)) or not isinstance(vectors, Iterable)
    given: Any = [vectors] if one else vectors
    return [as_vector(vector) for vector in given]


def layer_for(vectors: Sequence[PersonaVector], layer: Layer | None, *, purpose: str) -> Layer:
    """Return `layer`; where it is None, the one that all the vectors recommend for a purpose.

    Raises InputError where one recommends none, or they recommend different ones.
    """
    if layer is not None:
        return layer
    found = {vector.trait: vector.recommended(purpose).layer for vector in vectors}
    if len(set(found.values())) > 1:
        places = ", ".join(f"{trait} {place}" for trait, place in found.items())
        raise InputError(f"the recommended layers to {purpose} at differ ({places}): give a layer, or several")
    return next(iter(found.values()), 0)


def per_dose(vector: PersonaVector, layer: int) -> float:
    """Return the coefficient that makes the edit as long as the mean residual stream."""
    norms = vector.residual_norms
    if norms is None:
        raise InputError(f"{vector!r} does not know the residual norms that dose= needs: use coef=")
    return float(norms[layer] / vector.direction(layer).norm())


def finite(strength: S) -> S:
    """Return the strength of an edit; raises InputError where it is no finite number."""
    if isinstance(strength, (list, tuple)):
        raise InputError(f"coef or dose is {strength}: give one number, or a tensor with one for each row of the batch")
    if not callable(strength) and not torch.as_tensor(strength, dtype=torch.float32).isfinite().all():
        raise InputError(f"coef or dose is {strength}: give finite numbers")
    return strength


def incremental(
    vector: PersonaVector, *, layer: Layer, coef: S | None, dose: S | None
) -> tuple[S, dict[int, Float[Tensor, " hidden"]]]:
    """Return the strength of an edit, and the direction that it multiplies at each block.

    At several layers that is what the lower ones have not added yet: v_l - v_k, with k the steered layer before l.
    """
    strength = dose if coef is None else coef
    if strength is None or (coef is not None and dose is not None):
        raise InputError("give either coef= (times the vector) or dose= (a fraction of the residual norm)")
    directions: dict[int, Tensor] = {}
    before: Tensor | float = 0.0
    for index in chosen_layers(layer, len(vector.directions)):
        direction = to_add(vector, index) * (1.0 if dose is None else per_dose(vector, index))
        directions[index] = direction - before
        before = direction
    return finite(strength), directions


def to_add(vector: PersonaVector, layer: SupportsIndex) -> Float[Tensor, " hidden"]:
    """Return what a coefficient multiplies; raises InputError where a vector may not be steered with."""
    vector.check_edits()
    direction = vector.direction(layer).float()
    if "whitened" in vector.info and not direction.any():
        raise _zero(vector, layer)
    return direction


def _zero(vector: PersonaVector, layer: SupportsIndex) -> InputError:
    known = vector.info.get("whitened", {}).get("layers", [])
    where = f": it was whitened at {', '.join(map(str, known))}" if known else ""
    return InputError(f"{vector!r} is zero at layer {layer}{where}: give another layer")


def unit_directions(
    model: Model, vectors: Sequence[PersonaVector], layer: Layer
) -> dict[int, Float[Tensor, "vector hidden"]]:
    """Return v/|v| of every vector, stacked, for each layer in order.

    Raises InputError for vectors that do not fit the model or one another, for two of one name, and for a direction
    that is zero.
    """
    if not vectors:
        raise InputError("no vectors: give one PersonaVector or more")
    for index, vector in enumerate(vectors):
        vector.check_fits(model)
        vectors[0].check_same_model(vector)
        if vector.trait in [other.trait for other in vectors[:index]]:
            raise InputError(
                f"two vectors are called {vector.trait!r}: rename one, dataclasses.replace(vector, trait='...')"
            )
    units = {}
    for chosen in chosen_layers(layer, len(vectors[0].directions)):
        stacked = torch.stack([vector.direction(chosen).float() for vector in vectors])
        zero = (stacked.norm(dim=1) == 0).nonzero()
        if len(zero):
            raise _zero(vectors[int(zero[0])], chosen)
        units[chosen] = stacked / stacked.norm(dim=1, keepdim=True)
    return units


def projections(
    hidden: Float[Tensor, "batch token hidden"], units: Float[Tensor, "*batch vector hidden"]
) -> Float[Tensor, "batch token vector"]:
    """Return projections in float32, also inside autocast; `units` are for all rows, or each row's own."""
    kind = hidden.device.type  # the context manager costs as much as the product, and is there for training alone
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        return hidden.float() @ units.mT
