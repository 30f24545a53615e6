"""How long a cache is, which tokens are real, and which packed sequence a token is of."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


def cached_length(cache: Any) -> int | None:
    """Return how many tokens a cache holds; None where there is none, or it does not count them."""
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError, TypeError):  # caches of state-space models count no tokens
        return None


def real_tokens(
    mask: Any, shape: tuple[int, int], begin: int, virtual: int, device: torch.device
) -> Bool[Tensor, "batch token"] | None:
    """Return which tokens of a pass are real, from an attention mask of any form; None where all are.

    The pass reads [batch, token] of `shape`, from place `begin` of its rows on, whose first `virtual` are no text.
    """
    found, width = None, shape[1]
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = next(iter(mask.values()), None)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= width:
        end = begin + width
        found = (mask[:, begin:end] if end <= mask.shape[1] else mask[:, -width:]).bool()
    elif isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2] == width > 1:
        column = torch.arange(width, device=mask.device)
        own = column + (begin if begin + width <= mask.shape[3] else mask.shape[3] - width)
        sees_itself = mask[:, 0, column, own]
        found = sees_itself if sees_itself.dtype == torch.bool else sees_itself >= 0
        found = found.expand(shape)
    if virtual and begin < virtual:
        found = torch.ones(shape, dtype=torch.bool, device=device) if found is None else found
        found = found & (torch.arange(width, device=found.device) >= virtual - begin)
    return found


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
