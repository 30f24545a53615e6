from pathlib import Path

import pytest

from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import list_traits
from persona_vectors.vectors.shipped import list_vectors, load_vector

FOLDER = Path(__file__).parent.parent.parent / "vectors"


def test_every_shipped_trait_has_a_vector():
    assert list_vectors() == sorted(f"smollm2-135m/{name}" for name in list_traits())
    for name in list_vectors():
        vector = load_vector(name)
        assert f"{vector.model}/{vector.trait}" == name and vector.directions.shape == (30, 576)


def test_a_name_and_a_path_give_the_same_vector():
    path = FOLDER / "smollm2-135m" / "evil.safetensors"
    for given in (path, str(path)):
        assert load_vector(given).directions.equal(load_vector("smollm2-135m/evil").directions)


def test_an_unknown_name_lists_what_ships(tmp_path):
    with pytest.raises(InputError, match=r"no vector is called 'kind': give a .* one of smollm2-135m/apathetic, "):
        load_vector("kind")
    with pytest.raises(InputError, match="no vector file"):
        load_vector(tmp_path / "none.safetensors")
