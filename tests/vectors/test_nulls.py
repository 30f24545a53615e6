"""What random directions say beside a vector: shares, places and the freedom of the layer, against plain references."""

import numpy as np
import pytest
import torch
from helpers import random_direction, two_vectors

from persona_vectors.data.errors import InputError
from persona_vectors.vectors.moments import Moments
from persona_vectors.vectors.nulls import Nulls, effects, nulls_of, vectors_alone, with_nulls

HIDDEN, LAYERS, CONTROLS = 24, (3, 5), 60
NAMED = {"traits": ["a", "b"], "layers": LAYERS, "poolings": ["prompt_last", "response_mean"], "reference": "facts"}


def column_values(rows: int = 12) -> torch.Tensor:
    """Values of two vectors and the random directions at two layers, [row, pooling, column]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 2, len(LAYERS) * (2 + CONTROLS), generator=generator) + 0.3


def test_places_are_those_of_numpy():
    values = column_values()
    values[3, 1] = torch.nan  # an empty answer
    nulls = nulls_of(values, **NAMED)
    for pooling, name in enumerate(NAMED["poolings"]):
        kept = values[:, pooling].numpy()
        kept = kept[~np.isnan(kept[:, 0])]
        found = (kept.mean(axis=0) / kept.std(axis=0, ddof=1)).reshape(2, -1)
        for layer, trait in [(0, 0), (1, 1)]:
            place = nulls.place("ab"[trait], layer=LAYERS[layer], pooling=name)
            own, random = found[layer, trait], np.abs(found[layer, 2:])
            assert place.effect == pytest.approx(own, rel=1e-4)
            assert place.beaten_isotropic == pytest.approx((random[:30] < abs(own)).mean())
            assert place.beaten_covariance == pytest.approx((random[30:] < abs(own)).mean())
        best = nulls.over_layers("b", pooling=name)
        own, random = np.abs(found[:, 1]), np.abs(found[:, 2:]).max(axis=0)
        assert best["isotropic"].layer == LAYERS[own.argmax()]
        assert best["isotropic"].percentile == pytest.approx(100 * (random[:30] < own.max()).mean(), rel=1e-4)
        assert best["covariance"].percentile == pytest.approx(100 * (random[30:] < own.max()).mean(), rel=1e-4)
    assert len(nulls.rows()) == 2 * 2 * 2 and "60 random directions, half with the covariance of facts" in repr(nulls)
    torch.testing.assert_close(vectors_alone(values, vectors=2, layers=2)[..., 2:], values[..., 62:64], equal_nan=True)


def test_what_is_saved_is_what_was_found(tmp_path):
    values = column_values()
    values[:, 1] = torch.nan  # no answers
    nulls = nulls_of(values, **NAMED)
    nulls.save(tmp_path / "nulls.json")
    loaded = Nulls.load(tmp_path / "nulls.json")
    assert loaded.rows() == nulls.rows() and {row["pooling"] for row in loaded.rows()} == {"prompt_last"}
    assert np.isnan(loaded.place("a", layer=3).beaten_isotropic)
    torch.testing.assert_close(loaded.random, nulls.random, equal_nan=True)


def test_what_does_not_vary_has_no_effect():
    assert effects(torch.ones(1, 3)).isnan().all() and effects(torch.full((4, 2), torch.nan)).isnan().all()
    assert effects(torch.tensor([[2.0, 1.0], [2.0, 3.0]])).isnan().tolist() == [True, False]  # one prompt, read twice
    assert nulls_of(column_values()[..., :4], **NAMED) is None


def test_the_verdict_follows_a_planted_shift_and_not_a_nuisance_of_higher_variance():
    """Every question moves along the trait by 1, and along the nuisance by 3 with a deviation of 9."""
    generator = torch.Generator().manual_seed(1)
    scales = torch.ones(HIDDEN)
    scales[0] = 9.0
    moved = torch.randn(200, HIDDEN, generator=generator) * scales
    moved[:, 0] += 3.0
    moved[:, 1] += 1.0
    reference = Moments("m", 50, {0: torch.zeros(HIDDEN)}, {0: torch.diag(scales**2).double()}, "planted answers")
    trait, nuisance = torch.eye(HIDDEN)[1], torch.eye(HIDDEN)[0]
    from persona_vectors.vectors.vector import PersonaVector

    drawn = reference.random_vectors(PersonaVector("trait", "m", trait[None]), count=200)
    along = torch.stack([trait, nuisance, *(each.directions[0] for each in drawn)])
    named = {"traits": ["trait", "nuisance"], "layers": [0], "poolings": ["prompt_last"], "reference": "planted"}
    nulls = nulls_of((moved @ along.T)[:, None], **named)
    place = nulls.place("trait", pooling="prompt_last")
    assert min(place.beaten_isotropic, place.beaten_covariance) > 0.95
    assert nulls.place("nuisance", pooling="prompt_last").beaten_covariance < 0.9


def test_random_directions_stand_behind_the_vectors_and_say_what_they_are_of(model, tokenizer):
    vectors = two_vectors(model)
    read, source = with_nulls(model, tokenizer, vectors, layers=[0, 1], controls=20, reference=None)
    assert read[:2] == vectors and len(read) == 22 and source == "answers on plain facts"
    assert with_nulls(model, tokenizer, vectors, layers=[1], controls=0, reference=None) == (vectors, "")
    with pytest.raises(InputError, match="controls is 5: give 20 random directions or more, or 0"):
        with_nulls(model, tokenizer, vectors, layers=[1], controls=5, reference=None)
    other, fits = (Moments("m", 9, {1: torch.zeros(n)}, {1: torch.eye(n, dtype=torch.float64)}) for n in (4, 32))
    with pytest.raises(InputError, match="have no layer 0: they have 1"):
        with_nulls(model, tokenizer, vectors, layers=[0], controls=20, reference=fits)
    with pytest.raises(InputError, match=r"Moments.* do not fit PersonaVector.*: read them from the vector's model"):
        with_nulls(model, tokenizer, [random_direction(model)], layers=[1], controls=20, reference=other)
    nulls = nulls_of(column_values(), **NAMED)
    with pytest.raises(InputError, match="no random directions stand beside 'c': the traits are a, b"):
        nulls.place("c", layer=3)
    with pytest.raises(InputError, match="beside None: the layers are 3, 5"):
        nulls.place("a")
