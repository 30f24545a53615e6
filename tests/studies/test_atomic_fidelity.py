import pytest

from persona_vectors.evaluation.fidelity import (
    accuracy,
    hidden_deviation,
    internal_consistency,
    retest_consistency,
    sentences,
)


def test_planted_deviations_lower_the_accuracy_by_their_share():
    assert accuracy([0.6, 0.6, 0.6, 0.6]) == 1
    assert accuracy([0.6, -0.4, 0.6, 0.6]) == 0.75  # its mean is still in character
    assert hidden_deviation([0.6, -0.4, 0.6, 0.6]) == 1 and hidden_deviation([0.6, 0.6]) == 0
    assert hidden_deviation([-0.6, -0.4]) == 0
    assert accuracy([0.6, 0.9], low=0.0, high=0.7) == 0.5


def test_consistency_within_is_one_for_one_tone_and_zero_for_halves_at_both_ends():
    assert internal_consistency([0.3, 0.3, 0.3]) == 1
    assert internal_consistency([1, -1, 1, -1]) == 0
    assert internal_consistency([0.5, -0.5]) == pytest.approx(0.5)
    assert internal_consistency([0.4]) == 1


def test_consistency_between_answers_is_the_earth_mover_s_distance_over_the_range():
    assert retest_consistency([[0.2, -0.3, 0.9], [0.9, 0.2, -0.3]]) == 1  # the same in another order
    assert retest_consistency([[1, 1], [-1]]) == 0
    assert retest_consistency([[0.5, 0.5], [0.1, 0.1]]) == pytest.approx(1 - 0.4 / 2)
    assert retest_consistency([[1.0], [1.0], [-1.0]]) == pytest.approx(1 / 3)  # the mean over pairs


def test_sentences_are_parted_and_a_cut_one_is_left_out():
    assert sentences("It is. Is it? Yes! And then it w") == ["It is.", "Is it?", "Yes!"]
    assert sentences("all that there is") == ["all that there is"]
    assert sentences("...") == []
