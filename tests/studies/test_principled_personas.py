import numpy as np
import pytest

from persona_vectors.studies.principled_personas import FACTS, advantage, fidelity, personas, robustness


def test_the_advantage_is_the_expert_s_utility_less_nobody_s():
    assert advantage(np.array([3.0, 1.0]), np.array([1.0, 2.0])) == 0.5


def test_robustness_is_the_worst_attribute_s_and_never_their_mean():
    expert = np.array([2.0, 2.0])
    variants = np.array([[2.0, 2.0], [5.0, 5.0], [1.0, 2.0]])
    assert robustness(expert, variants) == -0.5
    assert robustness(expert, variants[:1]) == 0


def test_fidelity_is_the_rank_agreement_with_the_levels():
    levels = np.array([[0.0, 0], [1, 1], [2, 2], [3, 3]])
    assert fidelity(levels) == pytest.approx(1)
    assert fidelity(levels[::-1]) == pytest.approx(-1)
    assert fidelity(levels[[0, 1, 3, 2]]) == pytest.approx(4 / 6)  # five of six pairs agree


def test_right_answers_are_not_wrong_ones_and_personas_are_of_the_domain():
    for domain, facts in FACTS.items():
        assert all(len(set(answers)) == 4 for _, *answers in facts)
        assert all(domain in text for text in personas(domain)["attributes"] + personas(domain)["levels"])
        assert not any(domain in str(text) for text in personas(domain)["others"] + personas(domain)["same"])
