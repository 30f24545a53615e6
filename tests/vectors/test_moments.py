"""Moments of neutral answers, and what is made of them: whitened vectors and random directions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import block_outputs, random_direction

from persona_vectors.data.errors import InputError
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.vectors import moments as module
from persona_vectors.vectors.moments import Moments, neutral_moments
from persona_vectors.vectors.vector import PersonaVector

TALKS = [(f"What of {i}?", f"It is {'so ' * (i % 5)}{i * 37}.") for i in range(40)]


def answer_means(model, tokenizer) -> torch.Tensor:
    """One answer at a time: [answer, layer, hidden]."""
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, q), a) for q, a in TALKS]
    return torch.stack([block_outputs(model, [*p, *a])[:, len(p) :].mean(dim=1) for p, a in rows])


def test_streamed_moments_are_those_of_all_answers_at_once(model, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    found, means = neutral_moments(model, tokenizer, TALKS, layer=[0, 2]), answer_means(model, tokenizer)
    assert (found.count, list(found.mean)) == (40, [0, 2])
    for layer in (0, 2):
        torch.testing.assert_close(found.mean[layer], means[:, layer].mean(dim=0), rtol=1e-4, atol=1e-5)
        expected = torch.tensor(np.cov(means[:, layer].double().numpy().T))
        torch.testing.assert_close(found.covariance[layer], expected, rtol=1e-3, atol=1e-6)
    assert neutral_moments(model, tokenizer, TALKS, layer=0, first=9).count == 9
    with pytest.raises(InputError, match="these moments have no layer 1: they have 0, 2"):
        found.at(1)


def test_nothing_above_the_deepest_layer_is_run(model, tokenizer):
    ran = []
    model.get_decoder().layers[2].register_forward_hook(lambda *_: ran.append(2))
    neutral_moments(model, tokenizer, TALKS[:4], layer=[0, 1])
    assert not ran


def test_whitening_is_the_regularised_inverse(model, tokenizer):
    found, vector = neutral_moments(model, tokenizer, TALKS, layer=1), random_direction(model)
    whitened = found.whiten(vector, shrinkage=0.1)
    covariance = np.cov(answer_means(model, tokenizer)[:, 1].double().numpy().T)
    ridge = covariance + 0.1 * covariance.diagonal().mean() * np.eye(32)
    expected = np.linalg.inv(ridge) @ vector.directions[1].double().numpy()
    expected *= float(vector.directions[1].norm()) / np.linalg.norm(expected)
    np.testing.assert_allclose(whitened.directions[1].numpy(), expected, rtol=1e-3, atol=1e-4)
    assert not whitened.directions[[0, 2]].any() and whitened.trait == "t whitened"
    assert whitened.info["whitened"] == {"answers": 40, "shrinkage": 0.1}
    with pytest.raises(InputError, match="shrinkage is 0: give a number above 0"):
        found.whiten(vector, shrinkage=0)


def test_moments_of_activations_at_hand_are_those_that_are_read(model, tokenizer):
    read, made = (
        neutral_moments(model, tokenizer, TALKS, layer="all"),
        Moments.of(answer_means(model, tokenizer), model="m"),
    )
    assert (made.count, list(made.covariance)) == (40, [0, 1, 2])
    for layer in range(3):
        torch.testing.assert_close(made.mean[layer], read.mean[layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made.covariance[layer], read.covariance[layer], rtol=1e-3, atol=1e-6)


def test_random_directions_have_the_covariance_and_the_norm():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 8)) * np.array([5, 3, 1, 1, 0.5, 0.5, 0.1, 0])[:, None]
    covariance = torch.tensor(root.T @ root)
    found = Moments("m", 100, {1: torch.zeros(8)}, {1: covariance})
    vector = PersonaVector("t", "m", torch.ones(3, 8))
    drawn = found.random_vectors(vector, count=4000, seed=1)
    directions = torch.stack([each.directions[1] for each in drawn])
    torch.testing.assert_close(directions.norm(dim=1), torch.full((4000,), 8.0**0.5))
    isotropic, own = directions[:2000].double(), directions[2000:].double()
    # the share of each direction's length along the covariance's axes, as of a normal draw that is scaled to a length
    noise = torch.tensor(np.linalg.cholesky(covariance.numpy() + 1e-9 * np.eye(8)) @ rng.normal(size=(8, 20000))).T
    wanted = noise / noise.norm(dim=1, keepdim=True) * 8.0**0.5
    torch.testing.assert_close(own.T @ own / 2000, wanted.T @ wanted / 20000, rtol=0.15, atol=0.15)
    torch.testing.assert_close(isotropic.T @ isotropic / 2000, torch.eye(8, dtype=torch.float64), rtol=0.1, atol=0.1)
    again = found.random_vectors(vector, count=4000, seed=1)
    assert torch.equal(again[3999].directions, drawn[3999].directions) and drawn[3999].trait == "covariance 1999"


def test_a_planted_trait_is_found_by_the_whitened_vector_and_not_the_nuisance():
    """A vector that was extracted with a nuisance of higher variance in it: whitened, it follows the trait."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.ones(16)
    scales[0] = 20.0  # length, say: dimension 0; the trait is dimension 1
    neutral = torch.randn(400, 16, generator=generator) * scales
    found = Moments("m", 400, {0: neutral.mean(dim=0)}, {0: torch.tensor(np.cov(neutral.double().numpy().T))})
    vector = PersonaVector("t", "m", torch.zeros(1, 16).index_fill_(1, torch.tensor([1]), 2.0))
    vector = replace(vector, directions=vector.directions + torch.eye(16)[0] * 2.0)
    samples = torch.randn(300, 16, generator=generator) * scales
    samples[:150, 1] += 2.0

    def separation(chosen: PersonaVector) -> float:
        from sklearn.metrics import roc_auc_score

        return roc_auc_score([1] * 150 + [0] * 150, samples @ chosen.directions[0])

    assert separation(vector) < 0.65 and separation(found.whiten(vector)) > 0.85


def test_answers_that_do_not_vary_are_refused(model, tokenizer):
    with pytest.raises(InputError, match="1 answers do not vary: give two or more"):
        neutral_moments(model, tokenizer, TALKS[:1], layer=1)
    with pytest.raises(InputError, match="2 answers do not vary"):
        neutral_moments(model, tokenizer, [TALKS[0]] * 2, layer=1)
