"""Steering: add a persona vector to the residual stream inside a `with` (paper, section 3.2)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Layer, Model, model_shape, one_layer
from persona_vectors.model.devices import constant
from persona_vectors.model.hooks import Edit, edit_blocks
from persona_vectors.model.thoughts import Span
from persona_vectors.model.tokens import Positions, Tokens, check_positions
from persona_vectors.vectors.directions import Strength, finite, incremental, to_add
from persona_vectors.vectors.shipped import VectorLike, as_vector
from persona_vectors.vectors.vector import PersonaVector


@contextmanager
def steer(
    model: Model,
    vector: VectorLike,
    *,
    layer: Layer | None = None,
    coef: Strength | None = None,
    dose: Strength | None = None,
    positions: Positions = "all",
    during: str = "auto",
) -> Iterator[None]:
    """Add `coef` times the vector to the output of block `layer` in every forward pass inside the `with`.

    h <- h + coef * v, in the block's own dtype, out of place. `dose` is the alternative to `coef`: a fraction of the
    mean residual norm at that layer. Either may be a tensor [batch], one value a row; `coef` may be a function that is
    called in every pass, for a schedule: `lambda: 5 * trainer.state.global_step / trainer.state.max_steps`. Several
    layers, or "all", get incremental vectors, v_l - v_k with k the steered layer before l, so that the sum is never
    counted twice. Without a layer it is the one that the vector's file recommends, with the coefficient that was
    measured there unless another strength is given: see `vector.recommended("steer")`.

    `positions`: "all"; "prompt"; "response" (the prompt's last token, which predicts the answer's first, and all that
    follow); "labels" (in training, the tokens that the loss counts and those that predict them); or a mask
    [batch, token]. Padding is never edited. "prompt" and "response" need a pass that says where its answer begins: one
    inside `generate`, or one that is given a cache; elsewhere they are refused. The edit is the same with and without
    a KV cache, nested steers add up, and the model is as before afterwards, also after an error.

    `with pv.steer(...): trainer.train()` is preventative steering (paper, section 5.2). `during`: "auto" leaves
    evaluation, generation and DPO's reference alone once a training step has begun; "training" always does; "always"
    edits them too.

    Raises InputError for a vector or a layer that does not fit, or where none is given nor recommended, and
    RuntimeError where the hook never fired, in training at the first step.
    """
    vector = as_vector(vector)
    vector.check_fits(model)
    check_positions(positions)
    if layer is None:
        use = vector.recommended("steer")
        if isinstance(positions, str) and positions == "all" != use.positions:
            raise InputError(f"{vector!r} recommends positions={use.positions!r}: give them, or a layer of your own")
        layer, coef = use.layer, use.coef if coef is None and dose is None else coef
    strength, directions = incremental(vector, layer=layer, coef=coef, dose=dose)
    edits = {index: _add(strength, direction, positions) for index, direction in directions.items()}
    with edit_blocks(model, edits, during=during):
        yield


class RowEdit(NamedTuple):
    """What is added to one row of a batch: `coef` times the vector, at one layer, at these positions."""

    vector: PersonaVector
    layer: SupportsIndex
    coef: float
    positions: str | Span = "all"

    def told(self) -> list[Any]:
        """Return what tells this edit from another one, as JSON."""
        named = self.positions.name if isinstance(self.positions, Span) else self.positions
        where = [] if named == "all" else [named]
        return [self.vector.direction(self.layer).tolist(), int(self.layer), round(self.coef, 6), *where]


@contextmanager
def steer_rows(model: Model, rows: Sequence[RowEdit | None]) -> Iterator[None]:
    """Steer each row of a batch with a vector, layer and coefficient of its own; None leaves a row as it is.

    Many vectors, such as random controls, so share one forward pass. There is a row for each of the batch's, for each
    prompt of a `generate` that makes several rows of it, or for each sequence of a packed pass. See `steer` for
    positions and the errors.
    """
    layers, hidden = model_shape(model)
    shifts: dict[int, dict[str | Span, Tensor]] = {}
    for index, row in enumerate(rows):
        if row is not None:
            row.vector.check_fits(model)
            check_positions(row.positions)
            at = shifts.setdefault(one_layer(row.layer, layers), {})
            at.setdefault(row.positions, torch.zeros(len(rows), hidden, dtype=torch.float32))[index] = finite(
                row.coef
            ) * to_add(row.vector, row.layer)
    edits = {layer: _in_turn([_add(1.0, shift, p) for p, shift in at.items()]) for layer, at in shifts.items()}
    with edit_blocks(model, edits):
        yield


def _in_turn(edits: Sequence[Edit]) -> Edit:
    def edit(hidden: Tensor, tokens: Tokens) -> Tensor | None:
        for each in edits:
            hidden = each(hidden, tokens)  # type: ignore[assignment]
        return hidden

    return edit


def _add(strength: Strength, direction: Tensor, positions: Positions) -> Edit:
    """Return an edit that adds `strength` times the direction, [hidden], or [row, hidden] with one a row."""
    if callable(strength):
        unscaled = constant(direction)
    else:
        times = torch.as_tensor(strength, dtype=torch.float32)
        scaled = constant(times[..., None] * direction.to(times.device))

    def edit(hidden: Tensor, tokens: Tokens) -> Tensor:
        where = tokens.select(positions)
        if callable(strength):
            added = (finite(strength()) * unscaled(hidden.device)).to(hidden.dtype)
        else:
            added = scaled(hidden.device, hidden.dtype)
        moved = hidden + (added if added.ndim == 1 else tokens.per_row(added, "the edit"))
        return moved if where is None else torch.where(where[..., None].to(hidden.device), moved, hidden)

    return edit
