import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from persona_vectors.vectors.probes import auroc, held_out, left_out_fit, logistic


def test_scores_are_ridge_regression_s_on_the_other_groups():
    rng = np.random.default_rng(0)
    states, labels, groups = rng.normal(size=(12, 5)), rng.normal(size=12), np.array(["a", "b", "c"] * 4)
    scores = held_out(states, groups) @ labels
    for group in "abc":
        test = groups == group
        scale = ((states[~test] - states[~test].mean(axis=0)) ** 2).sum(axis=1).mean()
        fitted = Ridge(alpha=scale).fit(states[~test], labels[~test])
        expected = fitted.predict(states[test]) - labels[~test].mean()
        np.testing.assert_allclose(scores[test], expected, atol=1e-9)


def test_a_group_s_own_labels_have_no_say():
    states, groups = np.random.default_rng(1).normal(size=(9, 3)), np.repeat([0, 1, 2], 3)
    matrix = held_out(states, groups)
    assert all((matrix[i : i + 3, i : i + 3] == 0).all() for i in (0, 3, 6)) and np.count_nonzero(matrix) == 54


def test_auroc_is_the_share_of_pairs_in_order():
    scores, labels = np.array([0.1, 0.4, 0.4, 0.9, 0.3]), np.array([False, True, False, True, False])
    assert auroc(scores, labels) == pytest.approx(5.5 / 6) == pytest.approx(roc_auc_score(labels, scores))
    assert auroc(scores, np.zeros(5, dtype=bool)) == 0.5


def test_a_line_predicts_points_that_it_has_not_seen_and_noise_does_not():
    x = np.array([0.0, 1, 2, 5])
    assert left_out_fit(x, 3 * x - 1) == pytest.approx(1)
    # without each in turn of (0, 0), (1, 0), (2, 1): lines say -1, 0.5 and 0; means of the others 0.5, 0.5 and 0
    assert left_out_fit(np.array([0.0, 1, 2]), np.array([0.0, 0, 1])) == pytest.approx(1 - 2.25 / 1.5)


def test_logistic_weights_point_at_what_differs_and_do_not_mind_units():
    rng = np.random.default_rng(0)
    states, labels = rng.normal(size=(200, 3)), np.arange(200) % 2
    states[:, 1] += 4 * labels
    weights, bias = logistic(states, labels)
    assert ((states @ weights + bias > 0) == labels).mean() > 0.95
    assert weights[1] > 5 * np.abs(weights[[0, 2]]).max()
    units = np.array([1.0, 100.0, 0.01])
    scaled, same = logistic(states * units + 7, labels)
    assert scaled * units == pytest.approx(weights, rel=1e-3, abs=1e-4)
    assert same + scaled.sum() * 7 == pytest.approx(bias, abs=1e-2)


def test_a_symmetric_pair_has_its_boundary_in_the_middle():
    weights, bias = logistic(np.array([[1.0], [3.0]]), np.array([0, 1]))
    assert -bias / weights[0] == pytest.approx(2, abs=1e-4) and weights[0] > 0
