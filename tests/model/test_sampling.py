"""A draw beside its plain reference in Python's own numbers, and beside the softmax it is a draw of."""

import math

import pytest
import torch

from persona_vectors.model import sampling
from persona_vectors.model.sampling import Draws, row_seed

ROWS, VOCABULARY, PROMPT = 5, 11, 4


def draw(seeds: list[int], scores: torch.Tensor, temperature: float, step: int) -> list[int]:
    """Return the tokens drawn for the answers' token `step`."""
    draws = Draws(seeds, temperature)
    draws.prompt = PROMPT
    return draws(torch.zeros(len(scores), PROMPT + step, dtype=torch.long), scores).argmax(dim=1).tolist()


def noise(seed: int, place: int) -> float:
    """Return Gumbel noise of splitmix64's output number `place`, from 1, of a stream that begins at `seed`."""
    number, all_bits = (seed % 2**62 + place * 0x9E3779B97F4A7C15) % 2**64, 2**64 - 1
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & all_bits
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & all_bits
    number ^= number >> 31
    return -math.log(-math.log(((number >> 12) + 0.5) / 2**52))


@pytest.mark.parametrize("cached", [1, 2 * VOCABULARY, 2**18])
def test_a_draw_is_the_plain_references_whatever_is_made_at_a_time(cached: int, monkeypatch):
    monkeypatch.setattr(sampling, "CACHED", cached)
    scores = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    seeds = [row_seed(3, i) for i in range(ROWS)]
    for step in range(4):
        places = range(step * VOCABULARY + 1, (step + 1) * VOCABULARY + 1)
        wanted = []
        for seed, row in zip(seeds, scores.double().tolist()):
            noisy = [score / 0.7 + noise(seed, place) for score, place in zip(row, places)]
            wanted.append(noisy.index(max(noisy)))
        assert draw(seeds, scores, 0.7, step) == wanted, step


def test_scores_of_half_precision_are_drawn_from_in_full():
    scores = torch.randn(5000, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    seeds = [row_seed(5, i) for i in range(5000)]
    assert draw(seeds, scores, 1.0, 0) == draw(seeds, scores.float(), 1.0, 0)


def test_draws_follow_the_softmax():
    """Of 20,000 rows each token's share is within five standard errors of its probability."""
    count = 20_000
    scores = torch.tensor([2.0, 1.0, 0.0, -3.0])
    drawn = draw([row_seed(0, i) for i in range(count)], scores.expand(count, 4), 1.0, 1)
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / count
    chances = scores.softmax(dim=0)
    assert bool(((shares - chances).abs() <= 5 * (chances * (1 - chances) / count).sqrt()).all()), shares
