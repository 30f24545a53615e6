import numpy as np
import pytest
import torch

from persona_vectors.data.ledger import Ledger
from persona_vectors.studies import truthful_personas
from persona_vectors.studies.frame import Given
from persona_vectors.studies.truthful_personas import TRUTHS, is_right, preferences, trained
from persona_vectors.vectors.probes import auroc_within, held_out


def test_an_answer_is_right_that_holds_an_expected_word_and_not_a_part_of_another():
    assert is_right("The capital is rome.", ["Rome"]) and is_right("It is 12.", ["12"])
    assert not is_right("Romea and 312", ["Rome", "12"]) and not is_right("", ["Rome"])
    assert is_right("a pup", ["puppy", "pup"])


def test_a_question_does_not_hold_its_answer():
    assert len({q for facts in TRUTHS.values() for q, *_ in facts}) == sum(map(len, TRUTHS.values())) == 96
    for facts in TRUTHS.values():
        assert all(expected and not is_right(question, expected) for question, *expected in facts)


def planted(strength):
    """States of 80 questions on four topics, in which being right is one of ten units, and topics are others."""
    rng, topics = np.random.default_rng(0), np.repeat(["a", "b", "c", "d"], 20)
    labels = rng.random(80) < 0.5
    states = rng.normal(size=(80, 10))
    states[:, 0] += strength * labels
    states[:, 1] += 5 * (topics == "a")
    return held_out(states, topics), labels, topics


def test_a_planted_direction_is_read_on_topics_that_it_was_not_fitted_to():
    assert min(auroc_within(*planted(12.0))) == 1
    assert np.mean(auroc_within(*planted(0.0))) == pytest.approx(0.5, abs=0.15)


def test_how_hard_a_topic_is_tells_nothing():
    topics = np.repeat(["a", "b", "c"], 6)
    labels = np.array([True] * 6 + [False] * 6 + [True, False] * 3)
    states = np.repeat(np.eye(3), 6, axis=0)
    assert auroc_within(held_out(states, topics), labels, topics) == [0.5, 0.5, 0.5]


def test_permuted_labels_and_the_words_stand_beside_the_best_layer(study, monkeypatch):
    monkeypatch.setattr(truthful_personas, "answered", lambda given, facts: [True, False, True][: len(facts)])
    share, state, words, less, *_ = study("truthful_personas").lines
    assert share.value.mean == pytest.approx(2 / 3)
    assert less.value.mean == pytest.approx(state.value.mean - words.value.mean)
    assert all(0.5 < line.null < 1 for line in (state, words)) and state.null > words.null


FACTS = {  # of answers that are known and of others
    "a": [["One?", "un"], ["Two?", "deux"], ["Three?", "trois"]],
    "b": [["I?", "x"], ["II?", "y"], ["III?", "z"]],
}


def test_a_preference_is_for_the_right_answer_over_those_of_the_next_questions(model, tokenizer, monkeypatch):
    """A model that likes right answers of one topic by six nats, and of no other."""

    def liked(_model, rows):
        texts = [(tokenizer.decode(prompt), tokenizer.decode(answer)) for prompt, answer in rows]
        return torch.tensor([6.0 * any(q in p and a == t for q, t in FACTS["a"]) - len(a) for p, a in texts])

    monkeypatch.setattr(truthful_personas, "answer_logprobs", liked)
    found = preferences(Given(model, tokenizer, (), 1, 0, Ledger(None)), FACTS)
    assert found == pytest.approx([6.0, 0.0])  # over a topic the answers' lengths cancel


@pytest.mark.slow
def test_training_on_a_topic_s_answers_raises_those_that_it_was_trained_on(model, tokenizer):
    given = Given(model, tokenizer, (), 1, 0, Ledger(None))
    plain = preferences(given, FACTS)
    right, wrong = (trained(given, FACTS, "a", way) for way in (0, 1))
    assert right[0] > plain[0] and right[0] > wrong[0]
    assert preferences(given, FACTS) == plain
