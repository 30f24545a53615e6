import math
from contextlib import contextmanager

import pytest
import torch

from persona_vectors.data.ledger import Ledger
from persona_vectors.studies import personality_alignment
from persona_vectors.studies.frame import Given
from persona_vectors.studies.personality_alignment import (
    CHOOSING,
    ITEMS,
    MEASURED,
    PROBED,
    answers,
    distance,
    nearest,
)
from persona_vectors.vectors.probes import deviations


def test_the_parts_share_no_item_and_hold_every_factor_as_often():
    assert len({item for item, *_ in ITEMS}) == 50 == len(PROBED) + len(CHOOSING) + len(MEASURED)
    for part in (PROBED, CHOOSING, MEASURED):
        factors = [factor for _, factor, _ in part]
        assert {factors.count(factor) for factor in factors} == {len(part) // 5}


def test_a_planted_direction_has_the_length_of_its_projections_deviation():
    generator = torch.Generator().manual_seed(0)
    agrees = torch.arange(400) % 2 == 0
    states = torch.zeros(400, 2, 3, 8)
    states[:, 1, 2, 5] = torch.where(agrees, 3.0, -3.0)
    found = deviations(states + 1e-6 * torch.randn(states.shape, generator=generator), agrees)
    expected = 3 * math.sqrt(400 / 399)  # of half threes and half minus threes
    assert float(found[1, 2, 5]) == pytest.approx(expected, rel=1e-4)
    assert float(found[1, 2].norm()) == pytest.approx(expected, rel=1e-4) and float(found[0].norm()) < 1e-4


def test_a_distance_is_that_of_the_expected_answers(model, tokenizer, monkeypatch):
    person = {factor: 1 for _, factor, _ in ITEMS}
    asked = [("Am up.", ITEMS[0][1], 1), ("Am down.", ITEMS[0][1], -1)]
    assert answers(person, asked).tolist() == [5, 1]
    assert answers({ITEMS[0][1]: -1}, asked).tolist() == [1, 5]
    monkeypatch.setattr(personality_alignment, "item_scores", lambda *_, **__: torch.tensor([[4.0, 5.0], [3.0, 3.0]]))
    given = Given(model, tokenizer, (), 1, 0, Ledger(None))
    assert distance(given, person, asked) == pytest.approx((0.5 + 2) / 2)


@pytest.mark.parametrize(("best", "expected"), [(5.0, 105.0), (0.0, 100.0)])
def test_alpha_is_chosen_on_other_items_than_those_that_are_reported(best, expected):
    """A model that is nearest on CHOOSING at one alpha, and nearer on MEASURED at all others."""
    now = [0.0]

    @contextmanager
    def shift(alpha):
        now[0] = alpha
        yield
        now[0] = 0.0

    def far(items):
        return abs(now[0] - best) if items is CHOOSING else 100 + now[0]

    assert nearest(far, shift) == expected
