"""How long a cache is, and which packed sequence a token is of."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn


def cached_length(cache: Any) -> int | None:
    """Return how many tokens a cache holds; None where there is none, or it does not count them."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError, TypeError):  # caches of state-space models count no tokens
        return None


def packed_sequences(
    position_ids: Any, starts: Any, real: Tensor | None, shape: torch.Size
) -> Int[Tensor, "batch token"] | None:
    """Return which packed sequence each token is of, from positions that begin again or the sequences' bounds."""
    batch, width = shape[:2]
    if isinstance(starts, Tensor) and batch == 1:
        column = torch.arange(width, device=starts.device)
        found = torch.bucketize(column, starts[1:].contiguous(), right=True)[None]
        return found if len(starts) > 2 else None
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2 or position_ids.shape[1] != width:
        return None
    begins = position_ids.diff(dim=1) != 1
    if real is not None:  # positions of padding mean nothing
        real = real.to(begins.device)
        begins &= real[:, 1:] & real[:, :-1]
    begins = begins.expand(batch, width - 1)
    if not begins.any():
        return None
    return (nn.functional.pad(begins, (1, 0), value=True).flatten().cumsum(dim=0) - 1).view(batch, width)
