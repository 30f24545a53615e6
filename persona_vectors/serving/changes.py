"""The edits of a request: around its prompt's own pass, and in decoding steps that it shares with other requests."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from math import inf

import torch
from torch import Tensor

from persona_vectors.model.blocks import Model
from persona_vectors.steering.add import RowEdit, steer, steer_rows
from persona_vectors.steering.bounds import ablate, cap, floor
from persona_vectors.vectors.vector import PersonaVector

KINDS = ("steer", "ablate", "cap", "floor")


@dataclass(frozen=True, eq=False)
class Change:
    """One edit: a verb of `KINDS`, and what it is given."""

    kind: str
    vector: PersonaVector
    layer: int
    amount: float = 0.0
    """The coefficient of "steer", or the limit of "cap" and "floor"."""
    positions: str = "all"


@contextmanager
def change_prompt(model: Model, changes: Sequence[Change]) -> Iterator[None]:
    """Edit a pass that reads one prompt: the verbs themselves, the first one outermost."""
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(_verb(model, change, change.amount, change.positions))
        yield


@contextmanager
def change_rows(model: Model, rows: Sequence[Sequence[Change]]) -> Iterator[None]:
    """Edit each row of decoding steps, which read nothing but answers, with changes of its own in their order."""
    answers = [[change for change in changes if change.positions != "prompt"] for changes in rows]
    with ExitStack() as stack:
        for slot in zip_longest(*answers):  # of every row the first change, then of every row the second
            for edit in _together(model, slot):
                stack.enter_context(edit)
        yield


def _together(model: Model, slot: Sequence[Change | None]) -> Iterator[AbstractContextManager[None]]:
    """Yield edits that give each row its own change, where it has one."""
    steered = [RowEdit(c.vector, c.layer, c.amount) if c is not None and c.kind == "steer" else None for c in slot]
    if any(steered):
        yield steer_rows(model, steered)
    bounded = [c for c in slot if c is not None and c.kind != "steer"]
    for kind, vector, layer in dict.fromkeys((c.kind, c.vector, c.layer) for c in bounded):
        mine = [c is not None and (c.kind, c.vector, c.layer) == (kind, vector, layer) for c in slot]
        free = inf if kind == "cap" else -inf
        amounts = torch.tensor([c.amount if own and c is not None else free for c, own in zip(slot, mine)])
        where = torch.tensor(mine)[:, None] if kind == "ablate" else "all"
        yield _verb(model, Change(kind, vector, layer), amounts, where)


def _verb(
    model: Model, change: Change, amount: float | Tensor, positions: str | Tensor
) -> AbstractContextManager[None]:
    vector, layer = change.vector, change.layer
    if change.kind == "steer":
        return steer(model, vector, layer=layer, coef=amount, positions=positions)
    if change.kind == "ablate":
        return ablate(model, vector, layer=layer, positions=positions)
    bound = cap if change.kind == "cap" else floor
    return bound(model, vector, layer=layer, limit=amount, positions=positions)
