import numpy as np
import pytest

from persona_vectors.data.ledger import Ledger
from persona_vectors.evaluation.likelihood import likelihood_contrast, load_statements
from persona_vectors.steering.add import steer
from persona_vectors.studies.frame import Given
from persona_vectors.studies.persona_fuse import contrasts, gates, own_and_other

KINDS = np.repeat([0, 1], 20)


def test_the_gate_finds_a_planted_situation_in_new_prompts_and_none_where_there_is_none():
    rng = np.random.default_rng(0)
    known, new = rng.normal(size=(2, 40, 16))
    assert 0.2 < np.mean((gates(known, KINDS, new) > 0.5) == KINDS) < 0.8
    known[20:, :4] += 4
    new[20:, :4] += 4
    found = gates(known, KINDS, new)
    assert ((found > 0.5) == KINDS).all() and (np.abs(found - KINDS) < 0.3).all()


def test_a_right_gate_moves_the_own_trait_and_an_ungated_one_both():
    """The effect on trait 1 is twice its share, that on trait 0 its own share: then all is known."""
    kinds, shares = np.array([0, 0, 1, 1]), np.array([0.0, 0.0, 1.0, 1.0, 0.5])
    effects = np.stack([np.stack([1 - shares, 2 * shares], axis=-1)] * 4)
    own, other = own_and_other(effects, kinds, np.arange(4))
    assert own.tolist() == [1, 1, 2, 2] and other.tolist() == [0, 0, 0, 0]
    own, other = own_and_other(effects, kinds, np.full(4, 4))
    assert own.tolist() == [0.5, 0.5, 1, 1] and other.tolist() == [1, 1, 0.5, 0.5]
    own, other = own_and_other(effects, kinds, np.array([3, 2, 1, 0]))  # each has a gate of the other situation
    assert own.tolist() == [0, 0, 0, 0] and other.tolist() == [2, 2, 1, 1]


def test_no_share_is_the_plain_model_and_each_share_its_vector_s(model, tokenizer, vectors):
    given = Given(model, tokenizer, tuple(vectors), 1, 0, Ledger(None))
    plain, first, both = contrasts(given, "Who?", [[0, 0], [0.5, 0], [0.5, 1]])
    statements = load_statements("optimistic").split()[1].part(0, 3).model_copy(update={"question": "Who?"})
    one = steer(model, vectors[0], layer=1, coef=1.0)  # half of what the file recommends
    with one, steer(model, vectors[1], layer=1, coef=2.0):
        assert float(likelihood_contrast(model, tokenizer, statements).mean()) == pytest.approx(both[0], abs=1e-6)
    assert plain[0] == pytest.approx(float(likelihood_contrast(model, tokenizer, statements).mean()), abs=1e-6)
    assert len({plain[0], first[0], both[0]}) == 3
