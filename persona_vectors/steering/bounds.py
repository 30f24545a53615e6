"""Control: remove or bound a projection inside a `with`, or steer only where the hidden states meet a condition."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Layer, Model, model_shape, one_layer
from persona_vectors.model.devices import constant
from persona_vectors.model.hooks import Edit, edit_blocks
from persona_vectors.model.tokens import Positions, Tokens, check_positions
from persona_vectors.vectors.directions import finite, projections, to_add, unit_directions
from persona_vectors.vectors.shipped import VectorLike, as_vector

Limit = float | Tensor | Mapping[int, float]
"""A projection on v/|v|, in the residual stream's units: one for all, one a row [batch], or one a layer."""
Change = Callable[[Float[Tensor, "batch token"], Tokens], Float[Tensor, "batch token"]]
"""Gives each token the projection that it should have."""
Coefficient = Callable[[Float[Tensor, "batch token hidden"]], Float[Tensor, "batch token"]]
"""Gives each token its own coefficient, by its hidden state before the edit."""


@contextmanager
def ablate(
    model: Model, vector: VectorLike, *, layer: Layer, positions: Positions = "all", during: str = "auto"
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
    vector: VectorLike,
    *,
    layer: Layer,
    limit: Limit | None = None,
    positions: Positions = "all",
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
    vector: VectorLike,
    *,
    layer: Layer,
    limit: Limit | None = None,
    positions: Positions = "all",
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
    vector: VectorLike,
    *,
    layer: Layer,
    coef: float | Coefficient,
    when: Callable[[Float[Tensor, "batch token"]], Tensor] | None = None,
    watch: VectorLike | None = None,
    positions: Positions = "all",
    during: str = "auto",
) -> Iterator[None]:
    """Add `coef` times the vector only at tokens that meet a condition, which is read before the edit.

    `when` is given the projections [batch, token] on `watch` (by default the vector itself) at the same block, and
    returns where to steer: `lambda p: p > 3.2`. `coef` may be a function that is given the hidden states there,
    [batch, token, hidden], and returns each token's own, [batch, token], such as `nearest_coef`; tokens that get 0 stay
    bit-identical. Then `when` need not be given. `layer` is one layer.
    """
    index = one_layer(layer, model_shape(model)[0])
    if when is None and (watch is not None or not callable(coef)):
        raise InputError("steer_where needs when=, a condition on the projection, or a function for coef=")
    vector = as_vector(vector)
    unit = constant(unit_directions(model, [as_vector(watch or vector)], index)[index])
    vector.check_fits(model)
    direction = to_add(vector, index)
    shift = constant(direction if callable(coef) else finite(coef) * direction)

    def edit(hidden: Tensor, tokens: Tokens) -> Tensor:
        where, added = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device), shift(hidden.device)
        if when is not None:
            where = when(projections(hidden, unit(hidden.device))[..., 0].detach())
            _check_returned("when", where, hidden, torch.bool)
        if callable(coef):
            times = coef(hidden.detach())
            _check_returned("coef", times, hidden, torch.float32)
            where, added = where & (times != 0), times[..., None] * added
        return torch.where(_and(where, tokens, positions)[..., None], hidden + added.to(hidden.dtype), hidden)

    check_positions(positions)
    with edit_blocks(model, {index: edit}, during=during):
        yield


def _check_returned(name: str, value: Tensor, hidden: Tensor, dtype: torch.dtype) -> None:
    if value.shape != hidden.shape[:2] or value.dtype != dtype:
        wanted = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{name}= returned {value.dtype} {list(value.shape)}: return a {wanted} for each [batch, token]"
        )


@contextmanager
def rotate(
    model: Model,
    vector: VectorLike,
    *,
    layer: Layer,
    angle: float,
    positions: Positions = "all",
    during: str = "auto",
) -> Iterator[None]:
    """Turn each token's hidden state to `angle` degrees from the vector, in their common plane, at the norm it has.

    h <- |h| (cos(angle) u + sin(angle) w) with u = v/|v| and w the unit vector along h - <h, u> u: angular steering.
    0 is along the vector, 180 against it, 90 removes it; all tokens end at one angle, wherever they were. A hidden
    state that lies along the vector has no such plane, and stays. See `ablate` for the rest.
    """
    if not 0 <= angle <= 180:
        raise InputError(f"angle is {angle}: give degrees from the vector, 0 to 180")
    along, across = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    def editor(unit: Tensor) -> Edit:
        placed = constant(unit)

        def edit(hidden: Tensor, tokens: Tokens) -> Tensor:
            here, states = placed(hidden.device), hidden.float()
            rest = states - projections(hidden, here) * here
            size, length = rest.norm(dim=-1, keepdim=True), states.norm(dim=-1, keepdim=True)
            turned = length * (along * here + across * rest / size.clamp_min(1e-12))
            where = _and((size > 1e-6 * length)[..., 0], tokens, positions)
            return torch.where(where[..., None], turned.to(hidden.dtype), hidden)

        return edit

    check_positions(positions)
    vector = as_vector(vector)
    vector.check_edits()
    units = unit_directions(model, [vector], layer)
    with edit_blocks(model, {index: editor(unit) for index, unit in units.items()}, during=during):
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
    vector: VectorLike,
    layer: Layer,
    positions: Positions,
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
    vector = as_vector(vector)
    vector.check_edits()
    units = unit_directions(model, [vector], layer)
    with edit_blocks(model, {index: editor(change(index), unit) for index, unit in units.items()}, during=during):
        yield


def _and(where: Tensor, tokens: Tokens, positions: Positions) -> Tensor:
    selected = tokens.select(positions)
    return where if selected is None else where & selected.to(where.device)
