import math

import numpy as np
import pytest
import torch

from persona_vectors.vectors.probes import jaccard, jaccard_by_chance, scan, told_apart


def test_pairs_are_told_apart_at_the_layer_where_a_direction_is_planted():
    generator = torch.Generator().manual_seed(0)
    differences = torch.randn(12, 3, 16, generator=generator)
    differences[:, 1, 0] += 20
    told = told_apart(differences)
    assert told[:, 1].tolist() == [1] * 12 and told[:, [0, 2]].mean() < 0.8


def test_a_pair_has_no_say_in_its_own_direction():
    differences = torch.tensor([[[5.0, 0]], [[-1.0, 0]], [[-1.0, 0]]])
    assert told_apart(differences)[:, 0].tolist() == [0, 0, 0]  # the mean of all three points as the first one does


def test_the_scan_finds_planted_units_and_its_statistic_is_the_closed_form():
    p = np.linspace(0.02, 1, 100)
    planted = np.array([3, 40, 77])
    p[planted] = 0.001
    score, subset = scan(p)
    expected = 100 * (0.03 * math.log(0.03 / 0.001) + 0.97 * math.log(0.97 / 0.999))
    assert subset.tolist() == planted.tolist() and score == pytest.approx(expected)
    assert scan((np.arange(100) + 1) / 100)[0] == pytest.approx(0, abs=1e-6)  # no more small ones than there must be


def test_overlap_is_the_intersection_over_the_union():
    assert jaccard(np.array([1, 2, 3]), np.array([2, 3, 4])) == 0.5
    assert jaccard(np.array([1]), np.array([2])) == 0
    assert jaccard_by_chance(50, 50, 100) == pytest.approx(25 / 75)
    rng = np.random.default_rng(0)
    drawn = [jaccard(rng.choice(200, 40, replace=False), rng.choice(200, 100, replace=False)) for _ in range(500)]
    assert np.mean(drawn) == pytest.approx(jaccard_by_chance(40, 100, 200), abs=0.01)
