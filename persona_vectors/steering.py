"""Steering: add a persona vector to the residual stream inside a `with` (paper, section 3.2)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from persona_vectors.files import InputError
from persona_vectors.hooks import POSITIONS, Edit, Tokens, edit_blocks
from persona_vectors.models import Model, model_shape
from persona_vectors.vectors import PersonaVector


@contextmanager
def steer(
    model: Model,
    vector: PersonaVector,
    *,
    layer: int | Sequence[int] | str,
    coef: float | Tensor | None = None,
    dose: float | Tensor | None = None,
    positions: str | Tensor = "all",
) -> Iterator[None]:
    """Add `coef` times the vector to the output of block `layer` in every forward pass inside the `with`.

    h <- h + coef * v, in the block's own dtype, out of place. `dose` is the alternative to `coef`: a fraction of the
    mean residual norm at that layer. Either may be a tensor [batch], one value a row. Several layers, or "all", get
    incremental vectors, v_l - v_k with k the steered layer before l, so that the sum is never counted twice.

    `positions`: "all"; "prompt"; "response" (the prompt's last token, which predicts the answer's first, and all that
    follow); or a mask [batch, token]. Padding is never edited. The edit is the same with and without a KV cache,
    nested steers add up, and the model is as before afterwards, also after an error.

    Raises InputError for a vector or a layer that does not fit, and RuntimeError where the hook never fired.
    """
    vector.check_fits(*model_shape(model))
    if (coef is None) == (dose is None):
        raise InputError("give either coef= (times the vector) or dose= (a fraction of the residual norm)")
    if not isinstance(positions, Tensor) and positions not in POSITIONS:
        raise InputError(f"positions is {positions!r}: give one of {', '.join(POSITIONS)}, or a mask [batch, token]")
    edits: dict[int, Edit] = {}
    before: Tensor | float = 0.0
    for index in chosen_layers(vector, layer):
        shift = torch.as_tensor(coef if dose is None else dose * per_dose(vector, index), dtype=torch.float32)
        shift = shift[..., None] * vector.direction(index).to(shift.device)
        edits[index] = _add(shift - before, positions)
        before = shift
    with edit_blocks(model, edits):
        yield


class RowEdit(NamedTuple):
    """What `steer_rows` adds to one row of a batch: `coef` times the vector, at one layer."""

    vector: PersonaVector
    layer: int
    coef: float


@contextmanager
def steer_rows(model: Model, rows: Sequence[RowEdit | None], *, positions: str | Tensor = "all") -> Iterator[None]:
    """Steer each row of a batch with a vector, layer and coefficient of its own; None leaves a row as it is.

    Many vectors, such as random controls, so share one forward pass. See `steer` for `positions` and the errors.
    """
    layers, hidden = model_shape(model)
    shifts: dict[int, Tensor] = {}
    for index, row in enumerate(rows):
        if row is not None:
            row.vector.check_fits(layers, hidden)
            shift = shifts.setdefault(row.layer, torch.zeros(len(rows), hidden))
            shift[index] = row.coef * row.vector.direction(row.layer).float()
    with edit_blocks(model, {layer: _add(shift, positions) for layer, shift in shifts.items()}):
        yield


def chosen_layers(vector: PersonaVector, layer: int | Sequence[int] | str) -> list[int]:
    """Return the layers that `layer` names: a number, several numbers, or "all"."""
    if layer == "all":
        return list(range(len(vector.directions)))
    if isinstance(layer, str):
        raise InputError(f"layer is {layer!r}: give a number, several numbers, or 'all'")
    return [layer] if isinstance(layer, int) else sorted(set(layer))


def per_dose(vector: PersonaVector, layer: int) -> float:
    """Return the coefficient that makes the edit as long as the mean residual stream."""
    norms = vector.residual_norms
    if norms is None:
        raise InputError(f"{vector!r} does not know the residual norms that dose= needs: use coef=")
    return float(norms[layer] / vector.direction(layer).norm())


def _add(shift: Tensor, positions: str | Tensor) -> Edit:
    """Return an edit that adds `shift`, [hidden] or [batch, hidden]."""
    ready: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def edit(hidden: Tensor, tokens: Tokens) -> Tensor:
        place = (hidden.device, hidden.dtype)
        if place not in ready:
            ready[place] = shift.to(*place) if shift.ndim == 1 else shift[:, None].to(*place)
        where = tokens.select(positions)
        if where is None:
            return hidden + ready[place]
        return torch.where(where[..., None].to(hidden.device), hidden + ready[place], hidden)

    return edit
