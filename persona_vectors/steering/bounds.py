"""Control: remove or bound a projection inside a `with`, or steer only where it crosses a threshold."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Layer, Model, model_shape, one_layer
from persona_vectors.model.devices import constant
from persona_vectors.model.hooks import Edit, edit_blocks
from persona_vectors.model.tokens import Tokens, check_positions
from persona_vectors.vectors.directions import finite, projections, unit_directions
from persona_vectors.vectors.vector import PersonaVector

Limit = float | Tensor | Mapping[int, float]
"""A projection on v/|v|, in the residual stream's units: one for all, one a row [batch], or one a layer."""
Change = Callable[[Float[Tensor, "batch token"], Tokens], Float[Tensor, "batch token"]]
"""Gives each token the projection that it should have."""


@contextmanager
def ablate(
    model: Model, vector: PersonaVector, *, layer: Layer, positions: str | Tensor = "all", during: str = "auto"
) -> Iterator[None]:
    """Project the vector out of the output of block `layer` in every forward pass inside the `with`.

    h <- h - <h, u> u with u = v/|v|. In training this is CAFT (paper, section 5); gradients flow through it.
    `layer`, `positions` and `during` are as in `steer`, but each layer has its own whole direction.
    """
    with _set_projections(
        model, vector, layer, positions, during, lambda _: lambda projection, _: torch.zeros_like(projection)
    ):
        yield


@contextmanager
def cap(
    model: Model,
    vector: PersonaVector,
    *,
    layer: Layer,
    limit: Limit | None = None,
    positions: str | Tensor = "all",
    during: str = "auto",
) -> Iterator[None]:
    """Keep each token's projection at or below `limit`; tokens that are below stay bit-identical at that block.

    h <- h - max(<h, u> - limit, 0) u with u = v/|v|. `limit` is a number, a tensor [batch] with one value a row, or a
    mapping with one value a layer, such as `calibrate(...).at(95)`.
    """
    with _set_projections(model, vector, layer, positions, during, _clamp("cap", limit, torch.minimum)):
        yield


@contextmanager
def floor(
    model: Model,
    vector: PersonaVector,
    *,
    layer: Layer,
    limit: Limit | None = None,
    positions: str | Tensor = "all",
    during: str = "auto",
) -> Iterator[None]:
    """Keep each token's projection at or above `limit`; tokens that are above stay bit-identical at that block.

    h <- h - min(<h, u> - limit, 0) u with u = v/|v|: the Assistant Axis's "activation capping". See `cap`.
    """
    with _set_projections(model, vector, layer, positions, during, _clamp("floor", limit, torch.maximum)):
        yield


@contextmanager
def steer_where(
    model: Model,
    vector: PersonaVector,
    *,
    layer: Layer,
    coef: float,
    when: Callable[[Float[Tensor, "batch token"]], Tensor],
    watch: PersonaVector | None = None,
    positions: str | Tensor = "all",
    during: str = "auto",
) -> Iterator[None]:
    """Add `coef` times the vector only at tokens whose projection meets a condition, read before the edit.

    `when` is given the projections [batch, token] on `watch` (by default the vector itself) at the same block, and
    returns where to steer: `lambda p: p > 3.2`. `layer` is one layer.
    """
    index = one_layer(layer, model_shape(model)[0])
    unit = constant(unit_directions(model, [watch or vector], index)[index])
    vector.check_fits(model)
    vector.check_edits()
    shift = constant(finite(coef) * vector.direction(index).float())

    def edit(hidden: Tensor, tokens: Tokens) -> Tensor:
        where = when(projections(hidden, unit(hidden.device))[..., 0].detach())
        if where.shape != hidden.shape[:2] or where.dtype != torch.bool:
            raise InputError(f"when= returned {where.dtype} {list(where.shape)}: return a bool for each [batch, token]")
        moved = hidden + shift(hidden.device, hidden.dtype)
        return torch.where(_and(where, tokens, positions)[..., None], moved, hidden)

    check_positions(positions)
    with edit_blocks(model, {index: edit}, during=during):
        yield


def _clamp(verb: str, limit: Limit | None, bound: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], Change]:
    """Return what makes each layer's change; raises InputError where there is no limit for it."""
    if limit is None:
        raise InputError(f"{verb} needs limit=: a projection, or a calibration's, calibrate(...).at(95)")

    def at(layer: int) -> Change:
        if isinstance(limit, Mapping) and layer not in limit:
            raise InputError(f"limit has no value for layer {layer}: it has {', '.join(map(str, limit))}")
        value = torch.as_tensor(limit[layer] if isinstance(limit, Mapping) else limit, dtype=torch.float32)
        if value.isnan().any():
            raise InputError(f"the limit of {verb} is nan at layer {layer}: give a projection")
        given = constant(value)

        def wanted(projection: Tensor, tokens: Tokens) -> Tensor:
            limits = given(projection.device)
            return bound(projection, limits if limits.ndim == 0 else tokens.per_row(limits, "limit"))

        return wanted

    return at


@contextmanager
def _set_projections(
    model: Model,
    vector: PersonaVector,
    layer: Layer,
    positions: str | Tensor,
    during: str,
    change: Callable[[int], Change],
) -> Iterator[None]:
    """Give every token the projection that `change(layer)` asks for; tokens that have it already are not touched."""

    def editor(wanted: Change, direction: Tensor) -> Edit:
        unit = constant(direction)

        def edit(hidden: Tensor, tokens: Tokens) -> Tensor:
            wide, here = hidden.float(), unit(hidden.device)
            projection = projections(wide, here)[..., 0]
            missing = wanted(projection, tokens) - projection
            edited = (wide + missing[..., None] * here).to(hidden.dtype)
            return torch.where(_and(missing != 0, tokens, positions)[..., None], edited, hidden)

        return edit

    check_positions(positions)
    vector.check_edits()
    units = unit_directions(model, [vector], layer)
    with edit_blocks(model, {index: editor(change(index), unit) for index, unit in units.items()}, during=during):
        yield


def _and(where: Tensor, tokens: Tokens, positions: str | Tensor) -> Tensor:
    selected = tokens.select(positions)
    return where if selected is None else where & selected.to(where.device)
