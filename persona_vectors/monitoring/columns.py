"""A tensor that grows by tokens while a model generates."""

import torch
from torch import Tensor


class Columns:
    """A tensor [batch, token, ...] that grows by tokens on the device, and is moved from there when it is read."""

    def __init__(self) -> None:
        self.width = 0
        self.fresh: list[Tensor] = []
        self.moved: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        self.width += part.shape[1]
        self.fresh.append(part)
        if len(self.fresh) == 256:  # thousands of small tensors would take more memory than they hold
            self.fresh = [torch.cat(self.fresh, dim=1)]

    def crop(self, width: int) -> None:
        """Forget the columns from `width` on: drafts that were not accepted."""
        while self.width > width:
            parts = self.fresh or self.moved
            kept = max(parts[-1].shape[1] - (self.width - width), 0)
            self.width -= parts[-1].shape[1] - kept
            parts[-1:] = [parts[-1][:, :kept]] if kept else []

    def read(self) -> Tensor:
        if self.fresh:
            self.moved = [torch.cat([*self.moved, torch.cat(self.fresh, dim=1).cpu()], dim=1)]
            self.fresh = []
        return self.moved[0]
