import numpy as np
import pytest
import torch
from helpers import make_tokenizer

from persona_vectors.evaluation import likelihood
from persona_vectors.evaluation.psychometrics import icc, two_parameter_fit


def test_planted_discriminations_difficulties_and_abilities_are_recovered():
    rng = np.random.default_rng(0)
    a, b, theta = (
        np.array([0.6, 1.0, 1.5, 2.0, 1.2, 0.8]),
        np.array([-1.0, 0, 0.5, 1.0, -0.5, 0.2]),
        rng.normal(size=10000),
    )
    chances = 1 / (1 + np.exp(-a * (theta[:, None] - b)))
    found_a, found_b, found_theta = two_parameter_fit(torch.tensor(rng.random(chances.shape) < chances).float())
    np.testing.assert_allclose(found_a, a, atol=0.25)
    np.testing.assert_allclose(found_b, b, atol=0.2)
    assert np.corrcoef(found_theta, theta)[0, 1] > 0.7  # six items tell no more


def test_abilities_are_ordered_by_what_was_chosen_and_equal_for_equal_choices():
    choices = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).float()
    theta = two_parameter_fit(choices)[2]
    assert theta[0] < theta[1] < theta[2] < theta[3] and theta[2] == pytest.approx(float(theta[4]))
    assert float(two_parameter_fit(torch.tensor([[0.0, 1], [0, 1]]))[2].abs().max()) < 1


def test_icc_is_that_of_the_published_example():
    """Shrout and Fleiss 1979, table 2: ICC(2,1) = .29."""
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
    assert icc(ratings) == pytest.approx(0.29, abs=0.005)
    assert icc(np.array([[1.0, 1], [2, 2], [5, 5]])) == pytest.approx(1)


def test_a_margin_is_of_the_action_wherever_it_is_listed(model, monkeypatch):
    """A model that likes what is listed first, and otherwise the letters of the character's action by two nats."""

    def liked(_model, rows, **_):
        tokenizer = make_tokenizer()
        texts = [(tokenizer.decode(prompt), tokenizer.decode(answer)) for prompt, answer in rows]
        return torch.tensor(
            [5.0 * (f"?\n- {answer}" in prompt) + 2.0 * (answer == "Smile.") for prompt, answer in texts]
        )

    monkeypatch.setattr(likelihood, "answer_logprobs", liked)
    scenes = [("It rains.", "Smile.", "Frown.")]
    found = likelihood.forced_choice(model, make_tokenizer(), scenes, ["What do you do?", "And which?"])
    assert found.tolist() == [[2.0, 2.0]]
