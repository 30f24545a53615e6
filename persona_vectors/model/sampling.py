"""Sampling that depends on a row's seed alone."""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from persona_vectors.data.progress import pulse

CACHED = 2**18
"""How many tokens' noise is made at a time, which a CPU's cache holds; a GPU's many times as many."""


def row_seed(seed: int, number: int) -> int:
    """Return the seed of answer `number` of a run: those of two runs with seeds side by side have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:15], "big")


class Draws(LogitsProcessor):
    """Sample each row's next token with noise of its own: a hash of its seed, the step and the token.

    The token of the highest logit plus Gumbel noise is a sample of the softmax, and rounding seldom changes which.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.seeds = torch.tensor([[seed % 2**62] for seed in seeds])
        self.temperature, self.prompt = temperature, -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.prompt < 0:
            self.prompt = input_ids.shape[1]
        vocabulary = scores.shape[1]
        place = (input_ids.shape[1] - self.prompt) * vocabulary
        token = torch.arange(place + 1, place + vocabulary + 1, device=scores.device).mul_(_MIX[0])
        most = CACHED if scores.device.type == "cpu" else 64 * CACHED
        rows = max(most // vocabulary, 1)
        parts = zip(scores.split(rows), self.seeds.to(scores.device).split(rows))
        drawn = torch.cat([self._draw(part, seeds + token) for part, seeds in parts])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)

    def _draw(self, scores: Tensor, number: Int[Tensor, "row token"]) -> Int[Tensor, "row 1"]:
        below = scores.float() - scores.amax(dim=1, keepdim=True)
        shares = below.div_(-self.temperature).exp_()  # e to minus the logit: noise is -log(-log(the hash))
        return _hashed(number).log_().mul_(shares).argmax(dim=1, keepdim=True)


class Pulse(LogitsProcessor):
    """Change nothing, and say on the open progress bar how many of `length` tokens the answers have."""

    def __init__(self, length: int) -> None:
        self.done, self.length = 0, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.done += 1
        pulse(f"token {self.done} of at most {self.length}")
        return scores


_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""The constants of splitmix64, as signed numbers."""


def _hashed(number: Int[Tensor, "row token"]) -> Float[Tensor, "row token"]:
    """Return splitmix64 of each number, as a fraction above 0 and below 1: the same on every device.

    `number` is overwritten: the hash is many small operations on much memory.
    """
    shifted = torch.empty_like(number)
    for shift, factor in ((30, _MIX[1]), (27, _MIX[2]), (31, None)):
        torch.bitwise_right_shift(number, shift, out=shifted)
        number.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - shift) - 1))
        if factor is not None:
            number.mul_(factor)
    return number.bitwise_right_shift_(12).bitwise_and_(2**52 - 1).double().add_(0.5).mul_(2.0**-52)
