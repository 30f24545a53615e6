import math

import numpy as np
import torch

from persona_vectors.data.ledger import Ledger
from persona_vectors.evaluation import likelihood
from persona_vectors.evaluation.likelihood import State
from persona_vectors.studies.frame import Given
from persona_vectors.studies.user_personas import USERS, moved
from persona_vectors.vectors.probes import identified, signed_difference


def test_the_direction_is_what_statement_and_reply_say_together_and_neither_alone():
    rng = torch.Generator().manual_seed(0)
    signs = torch.tensor([1.0, 1, 1, -1, -1, -1])
    planted, reply = torch.randn(2, 5, generator=rng), torch.randn(2, 5, generator=rng)
    statement = torch.randn(6, 1, 2, 5, generator=rng) + 9 * signs[:, None, None, None]
    replies = torch.tensor([1.0, -1.0])[None, :, None, None]
    states = statement + 7 * reply * replies + planted * replies * signs[:, None, None, None]
    torch.testing.assert_close(signed_difference(states, signs), 2 * planted, atol=1e-5, rtol=1e-5)


def test_matching_and_opposing_statements_are_as_many():
    for matching, opposing in USERS["personas"].values():
        assert len(matching) == len(opposing) == len({*matching, *opposing}) / 2 == 4


def test_a_word_is_found_where_its_own_request_raises_it_most():
    own = np.array([[1.0, 5, 0], [0, 7, 0], [0, 5, 2]])  # the second word is the likeliest everywhere
    assert identified(own).tolist() == [1, 1, 1]
    assert identified(own[[1, 0, 2]]).tolist() == [0, 0, 1]


def test_what_a_state_moves_is_the_mean_over_pairs_of_the_refusal_less_the_compliance(model, tokenizer, monkeypatch):
    """A model that likes to refuse where the system says so, by two nats, and longer texts less."""

    def liked(_model, rows, **_):
        texts = [(tokenizer.decode(prompt), tokenizer.decode(answer)) for prompt, answer in rows]
        refusals = [pair[0] for pair in USERS["answers"]]
        return torch.tensor([2.0 * ("Refuse" in prompt and text in refusals) - len(text) for prompt, text in texts])

    monkeypatch.setattr(likelihood, "answer_logprobs", liked)
    given = Given(model, tokenizer, (), 1, 0, Ledger(None))
    assert moved(given, [State(system="Refuse."), State(system="Help.")]) == [[2, 2], [0, 0]]


def test_effects_stand_beside_random_directions_and_every_way_has_its_null(study):
    lines = study("user_personas").lines
    assert len(lines) == 2 * len(USERS["personas"]) + 3 * 2  # two layers of a model of three blocks
    assert all(math.isfinite(line.null) for line in lines) and lines[0].null > 0
