"""A tensor that grows by tokens while a model generates."""

from collections.abc import Callable

import torch
from torch import Tensor

from persona_vectors.model.reads import enough


class Columns:
    """A tensor [batch, token, ...] that grows by tokens on the device, and is moved from there when it is read.

    `work` makes such a tensor of the blocks' outputs [layer, batch, token, hidden] that `wait` is given.
    """

    def __init__(self, work: Callable[[Tensor], Tensor] = Tensor.clone) -> None:
        self.width, self.work = 0, work
        self.waiting: list[Tensor] = []
        self.fresh: list[Tensor] = []
        self.moved: list[Tensor] = []

    def wait(self, states: Tensor) -> None:
        """Add what `work` makes of a decoding step, later, together with other steps."""
        self.width += states.shape[2]
        self.waiting.append(states)
        if enough(self.waiting, states):
            self.settle()

    def settle(self) -> None:
        """Do the work on the steps that wait, and keep them no longer."""
        if self.waiting:
            states, self.waiting = torch.cat(self.waiting, dim=2), []
            self.width -= states.shape[2]
            self.add(self.work(states))

    def add(self, part: Tensor) -> None:
        self.settle()
        self.width += part.shape[1]
        self.fresh.append(part)
        if len(self.fresh) == 256:  # thousands of small tensors would take more memory than they hold
            self.fresh = [torch.cat(self.fresh, dim=1)]

    def crop(self, width: int) -> None:
        """Forget the columns from `width` on: drafts that were not accepted."""
        self.settle()
        while self.width > width:
            parts = self.fresh or self.moved
            kept = max(parts[-1].shape[1] - (self.width - width), 0)
            self.width -= parts[-1].shape[1] - kept
            parts[-1:] = [parts[-1][:, :kept]] if kept else []

    def read(self) -> Tensor:
        self.settle()
        if self.fresh:
            self.moved = [torch.cat([*self.moved, torch.cat(self.fresh, dim=1).cpu()], dim=1)]
            self.fresh = []
        return self.moved[0]
