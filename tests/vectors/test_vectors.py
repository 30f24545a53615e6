from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from safetensors import safe_open
from safetensors.torch import save_file

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.model.blocks import model_name
from persona_vectors.model.identity import config_hash
from persona_vectors.steering.add import steer
from persona_vectors.vectors.controls import random_null, random_vector
from persona_vectors.vectors.vector import PersonaVector


def make(trait: str = "calm", seed: int = 0, **fields) -> PersonaVector:
    directions = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    return PersonaVector(**{"trait": trait, "model": "tiny", "directions": directions, **fields})


def test_a_saved_vector_loads_bit_identical(tmp_path: Path):
    info = {"seed": 1, "judge": "none", "quotes": 'a "b" ü'}
    norms = {"residual_norms": torch.rand(3), "split_half_cosine": torch.rand(3), "separation": torch.rand(3)}
    vector = make(pooling="prompt_last", info=info, **norms)
    vector.save(tmp_path / "v.safetensors")
    loaded = PersonaVector.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.directions, vector.directions)
    assert all(torch.equal(getattr(loaded, name), value) for name, value in norms.items())
    assert (loaded.trait, loaded.model, loaded.pooling, loaded.info) == ("calm", "tiny", "prompt_last", info)
    with safe_open(tmp_path / "v.safetensors", framework="pt") as file:
        assert {"layer_base", "sign", "scale", "hook_site", "format_version"} <= set(file.metadata())


def test_arithmetic_and_cosine():
    a, b = make("a", 0), make("b", 1)
    torch.testing.assert_close((a + 2 * b - a / 2).directions, a.directions / 2 + 2 * b.directions)
    torch.testing.assert_close((-a).cosine(a), -torch.ones(3))
    assert (a + b).trait == "a + b"


def test_project_is_the_component_along_the_unit_direction():
    vector = make()
    hidden = 3 * vector.directions[1] / vector.directions[1].norm()
    torch.testing.assert_close(vector.project(hidden.expand(2, 4, 8), layer=1), torch.full((2, 4), 3.0))
    with pytest.raises(InputError, match="layer 3 is out of range"):
        vector.project(hidden, layer=3)


@pytest.mark.parametrize("other", [{"model": "else"}, {"directions": torch.ones(2, 8)}, {"info": {"config_hash": "b"}}])
def test_vectors_of_different_models_do_not_mix(other: dict):
    vector = make(info={"config_hash": "a"} if "info" in other else {})
    with pytest.raises(InputError, match="different models"):
        vector + make(**other)


def test_a_vector_of_another_model_of_the_same_shape_is_told(model, recwarn):
    shape = {"directions": torch.ones(3, 32)}
    own = make(model=model_name(model), info={"config_hash": "of an older release"}, **shape)
    for fits in (own, make(model="a copy", info={"config_hash": config_hash(model)}, **shape), make(**shape)):
        fits.check_fits(model)
    assert not recwarn
    other = make(model="else", info={"config_hash": "b"}, **shape)
    with pytest.warns(UserWarning, match="is of another model than LlamaForCausalLM, whose config differs: extract"):
        with steer(model, other, layer=1, coef=1.0):
            model(torch.tensor([[5]]))
    replace(other, model=model_name(model)).check_fits(model)  # insisted
    assert not recwarn


def test_a_random_vector_has_the_norms_and_no_resemblance():
    directions = torch.randn(3, 2000)
    vector = make(directions=directions)
    control = random_vector(vector, seed=3)
    torch.testing.assert_close(control.directions.norm(dim=1), directions.norm(dim=1))
    assert control.cosine(vector).abs().max() < 0.1
    assert torch.equal(control.directions, random_vector(vector, seed=3).directions)


def test_truncated_changed_and_foreign_files_are_refused(tmp_path: Path):
    path = tmp_path / "v.safetensors"
    make().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(InputError, match="no whole safetensors file"):
        PersonaVector.load(path)
    path.write_bytes(whole[:-4] + b"abcd")
    with pytest.raises(InputError, match="was changed after it was written"):
        PersonaVector.load(path)
    path.write_bytes(whole.replace(b"calm", b"evil"))
    with pytest.raises(InputError, match="was changed after it was written"):
        PersonaVector.load(path)
    save_file({"directions": torch.ones(3, 8)}, path)
    with pytest.raises(InputError, match="no persona-vector header"):
        PersonaVector.load(path)
    save_file({"directions": torch.ones(3, 8)}, path, metadata={"format_version": "99"})
    with pytest.raises(InputError, match="format version 99, and this release reads 1: update"):
        PersonaVector.load(path)
    with pytest.raises(InputError, match="no vector file"):
        PersonaVector.load(tmp_path / "none.safetensors")


def test_a_pickle_is_not_unpickled(tmp_path: Path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for name in ("v.pt", "v.safetensors"):
        torch.save({"directions": Hostile()}, tmp_path / name)
        with pytest.raises(InputError, match="no whole safetensors file"):
            PersonaVector.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path):
    path = tmp_path / "v.safetensors"
    make().save(path)
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError), atomic_path(path) as temporary:
        temporary.write_text("half\ud800", encoding="utf-8")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_must_fit_the_layers():
    with pytest.raises((InputError, TypeCheckError), match="separation"):
        make(separation=torch.ones(2))


def test_random_vectors_like_activations_have_their_covariance():
    like = torch.randn(400, 2, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 1, 1, 1, 0.1]) + 7
    vector = PersonaVector("t", "m", torch.ones(2, 6))
    drawn = torch.stack([random_vector(vector, seed=seed, like=like).directions for seed in range(2000)])
    torch.testing.assert_close(drawn.norm(dim=2), vector.directions.norm(dim=1).expand(2000, 2))
    share = (drawn[:, 0] ** 2).mean(dim=0)
    assert share[0] > share[1] > 3 * share[2] and share[5] < 0.01 * share[0]
    assert drawn.mean(dim=0).abs().max() < 0.15  # the activations' mean, 7, is no direction of theirs


def test_random_directions_have_the_same_freedom_of_layer():
    scores = torch.rand(400, 12, generator=torch.Generator().manual_seed(0))
    found = random_null(scores[0], scores[1:])
    assert found.own == pytest.approx(float(scores[0].max())) and found.layer == int(scores[0].argmax())
    torch.testing.assert_close(found.random, scores[1:].amax(dim=1))
    assert found.percentile == pytest.approx(100 * float((found.random < found.own).float().mean()))
    assert found.at(50) == pytest.approx(float(found.random.median())) and found.at(97.5) > 0.98
    other = torch.rand(400, 12, generator=torch.Generator().manual_seed(1))
    held_out = random_null(scores[0], scores[1:], chosen_on=(other[0], other[1:]))
    assert held_out.layer == int(other[0].argmax()) and held_out.own == pytest.approx(float(scores[0, held_out.layer]))
    assert held_out.at(50) == pytest.approx(0.5, abs=0.1)  # the choice was made on other data, so it gains nothing
    planted = scores[0].clone()
    planted[4] = 2.0
    assert random_null(planted, scores[1:]).percentile == 100
    with pytest.raises(InputError, match=r"the scores are \[12\] and \[0, 12\].*one random direction or more"):
        random_null(scores[0], scores[:0])
    with pytest.raises(InputError, match="a number for each"):
        random_null(torch.full((12,), torch.nan), scores)
