"""Moments of neutral answers, and what is made of them: whitened vectors and random directions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import block_outputs, hooks, make_trainer, random_direction

from persona_vectors.data.errors import InputError
from persona_vectors.flagging.run import flag
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.monitoring.calibration import calibrate
from persona_vectors.monitoring.projection import project
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import RowEdit, steer, steer_rows
from persona_vectors.steering.backends import lens_hooks
from persona_vectors.steering.bounds import ablate, cap, floor, rotate, steer_where
from persona_vectors.training.shifts import finetuning_shift
from persona_vectors.training.watch import penalize
from persona_vectors.vectors import moments as module
from persona_vectors.vectors.exports import export_vector
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
    facts = {"answers": 40, "shrinkage": 0.1, "reference": "a list", "layers": [1]}
    assert whitened.info["whitened"] == (2 * whitened).info["whitened"] == facts
    with pytest.raises(InputError, match="shrinkage is 0: give a number above 0"):
        found.whiten(vector, shrinkage=0)
    with pytest.raises(InputError, match=r"Moments\(.* do not fit PersonaVector\(.*3 layers x 4"):
        found.whiten(PersonaVector("t", "m", torch.ones(3, 4)))


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


def test_moments_are_kept_in_a_file(model, tokenizer, tmp_path):
    found, path = neutral_moments(model, tokenizer, TALKS, layer=[0, 2]), tmp_path / "moments.safetensors"
    found.save(path)
    loaded = Moments.load(path)
    assert (loaded.model, loaded.count, loaded.source, list(loaded.mean)) == (found.model, 40, "a list", [0, 2])
    vector = random_direction(model)
    assert torch.equal(loaded.whiten(vector).directions, found.whiten(vector).directions)
    drawn, again = (each.random_vectors(vector, count=4) for each in (found, loaded))
    assert all(torch.equal(a.directions, b.directions) for a, b in zip(drawn, again))
    assert list(loaded.only([2]).covariance) == [2] and not loaded.only([2]).whiten(vector).directions[0].any()
    with pytest.raises(InputError, match="have no layer 1"):
        loaded.only([1, 2])
    whitened = found.whiten(vector)
    whitened.save(tmp_path / "w.safetensors")
    assert PersonaVector.load(tmp_path / "w.safetensors").info == whitened.info
    with pytest.raises(InputError, match="holds no moments of this release"):
        Moments.load(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="no moments file"):
        Moments.load(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="no whole safetensors file"):
        Moments.load(path)


EDITS = {
    "steer": lambda model, vector: steer(model, vector, layer=1, coef=1.0),
    "steer_rows": lambda model, vector: steer_rows(model, [RowEdit(vector, 1, 1.0)]),
    "steer_where": lambda model, vector: steer_where(model, vector, layer=1, coef=1.0, when=lambda p: p > 0),
    "ablate": lambda model, vector: ablate(model, vector, layer=1),
    "cap": lambda model, vector: cap(model, vector, layer=1, limit=0.0),
    "floor": lambda model, vector: floor(model, vector, layer=1, limit=0.0),
    "rotate": lambda model, vector: rotate(model, vector, layer=1, angle=60.0),
}


@pytest.mark.parametrize("verb", EDITS)
def test_a_whitened_vector_edits_nothing(model, tokenizer, verb: str):
    vector = random_direction(model)
    whitened = neutral_moments(model, tokenizer, TALKS, layer=1).whiten(vector)
    for chosen in (whitened, -whitened):
        with pytest.raises(InputError, match="is whitened, for reading alone: edit with the vector") as error:
            with EDITS[verb](model, chosen):
                pass
        assert "\n" not in str(error.value)
    assert hooks(model) == 0
    with EDITS[verb](model, vector), torch.no_grad():  # the plain one does
        model(input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(InputError, match="edit with the vector"):
        lens_hooks(whitened, layer=1, coef=1.0)


def test_a_whitened_vector_steers_where_that_is_asked_for(model, tokenizer, tmp_path):
    """Made with steers=True the verbs take it as they do the same directions of any vector; no export does."""
    vector, facts = random_direction(model), neutral_moments(model, tokenizer, TALKS, layer=1)
    whitened = facts.whiten(vector, steers=True)
    torch.testing.assert_close(whitened.directions, facts.whiten(vector).directions)
    whitened.save(tmp_path / "w.safetensors")
    plain = PersonaVector("t", "m", whitened.directions)
    ids = torch.tensor([[5, 6, 7]])
    for verb, edit in EDITS.items():
        with edit(model, PersonaVector.load(tmp_path / "w.safetensors")), torch.no_grad():
            edited = model(input_ids=ids).logits
        with edit(model, plain), torch.no_grad():
            assert torch.equal(edited, model(input_ids=ids).logits), verb
    for layer in (0, [0, 1]):
        with pytest.raises(InputError, match="is zero at layer 0: it was whitened at 1: give another layer"):
            with steer(model, whitened, layer=layer, coef=1.0):
                pass
    with pytest.raises(InputError, match="is whitened, which no other tool's file says"):
        export_vector(whitened, out=tmp_path / "v.gguf", format="gguf")


def test_a_whitened_vector_is_neither_exported_nor_trained_against(model, tokenizer, tmp_path):
    whitened = neutral_moments(model, tokenizer, TALKS, layer=1).whiten(random_direction(model))
    with pytest.raises(InputError, match="is whitened, which no other tool's file says"):
        export_vector(whitened, out=tmp_path / "v.gguf", format="gguf")
    with pytest.raises(InputError, match="is whitened, for reading alone"):
        with penalize(make_trainer(model, tmp_path), whitened, layer=1, weight=1.0):
            pass
    assert not (tmp_path / "v.gguf").exists()


def test_a_whitened_vector_is_read_like_any_other_where_it_was_whitened(model, tokenizer, tmp_path):
    vector = random_direction(model)
    whitened = neutral_moments(model, tokenizer, TALKS, layer=1).whiten(vector)
    means = answer_means(model, tokenizer)[:3, 1]
    scores = project(model, tokenizer, TALKS[:3], [vector, whitened], layer=1)["response_mean"]
    torch.testing.assert_close(scores["t whitened"], whitened.project(means, layer=1), rtol=1e-4, atol=1e-4)
    with monitor(model, whitened, layer=1) as trace, torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    states = block_outputs(model, [5, 6, 7])[1]
    torch.testing.assert_close(trace["t whitened"][0], whitened.project(states, layer=1), rtol=1e-4, atol=1e-4)
    assert calibrate(model, tokenizer, whitened, ["How?"], layer=1, max_new_tokens=4).trait == "t whitened"
    found = flag(
        model, tokenizer, TALKS[:9], whitened, layer=1, baseline="none", out=tmp_path / "f.parquet", controls=20
    )
    whole = whitened.project(answer_means(model, tokenizer)[:9, 1], layer=1)
    assert found.summary["t whitened"].mean == pytest.approx(float(whole.mean()), rel=1e-3)
    moved = finetuning_shift(model, tokenizer, whitened, tuned=model, questions=["How?"], layer=1, max_new_tokens=0)
    assert moved.interval("t whitened").mean == 0
    with pytest.raises(InputError, match="is zero at layer 2: it was whitened at 1: give another layer"):
        project(model, tokenizer, TALKS[:3], whitened, layer=[1, 2])
