import numpy as np
import pytest

from persona_vectors.evaluation.psychometrics import change_distance, standard_changes

ONE = {"a": [1.0, 2.0, 3.0], "b": [0.0, 10.0]}
"""Coordinates whose items have deviations 1 and sqrt(50)."""


def moved(a: float, b: float) -> dict[str, list[float]]:
    """Return a model whose items are all moved, by so many of their coordinate's deviations."""
    return {"a": [value + a for value in ONE["a"]], "b": [value + b * 50**0.5 for value in ONE["b"]]}


def test_a_difference_is_in_deviations_of_the_first_model_s_items():
    found = standard_changes(ONE, moved(0.5, -2.0))
    assert found["a"].tolist() == pytest.approx([0.5] * 3) and found["b"].tolist() == pytest.approx([-2.0] * 2)


def test_the_distance_is_the_root_mean_square_over_coordinates():
    assert change_distance(ONE, moved(3.0, -4.0)).mean == pytest.approx(np.sqrt(12.5))
    assert change_distance(ONE, ONE) == (0, 0, 0)
    found = change_distance(ONE, moved(3.0, -4.0))
    assert (found.low, found.high) == pytest.approx((3, 4))  # resamples hold either coordinate alone


def test_items_that_change_places_are_no_distance():
    assert change_distance(ONE, {"a": [3.0, 1.0, 2.0], "b": [10.0, 0.0]}).mean == pytest.approx(0)


@pytest.mark.slow
def test_training_on_the_spot_moves_the_fingerprint_and_leaves_the_model(study, model):
    before = [parameter.clone() for parameter in model.parameters()]
    found = {line.what: line for line in study("behavioural_fingerprint").lines}
    assert found["distance of a LoRA on optimistic statements"].value.mean > 0
    assert all(bool((a == b).all()) for a, b in zip(before, model.parameters()))
