import numpy as np
import pytest

from persona_vectors.studies import embedding_to_prefix
from persona_vectors.studies.embedding_to_prefix import LIVES, share


def test_the_share_is_of_the_prompt_s_mean_gain():
    assert share(np.array([1.0, 3.0]), np.array([4.0, 4.0])) == 0.5
    assert share(np.array([0.0, 0.0]), np.array([1.0, 5.0])) == 0


def test_every_fact_has_as_many_values_and_no_question_holds_one():
    assert {len(values) for *_, values in [(q, t, v) for q, t, *v in LIVES]} == {6}
    assert all(text.count("{}") == 1 and value not in question for question, text, *values in LIVES for value in values)


def test_shares_stand_beside_other_people_s_histories(study, monkeypatch):
    """A person's own history gives three quarters of the gain, and other people's a quarter."""
    people = [[-4.0, -6.0]] + [[-6.0, -8.0]] * 5
    known = {"plain": [-7.0, -9.0], "prompt": [-3.0, -5.0], "one embedding": people, "a weighted history": people}
    monkeypatch.setattr(embedding_to_prefix, "measure", lambda given: known)
    gain, kept, less, *_ = study("embedding_to_prefix").lines
    assert gain.value.mean == 4 and kept.value.mean == pytest.approx(0.75) and kept.null == pytest.approx(0.25)
    assert less.value.mean == pytest.approx(2)


@pytest.mark.slow
def test_people_who_are_measured_were_not_trained_on(study, monkeypatch):
    rows = {}

    def fit(model, known, vectors, **options):
        rows["known"] = known
        return original(model, known, vectors, **options)

    def read(model, of, soft=None):
        rows.setdefault("read", []).extend(of)
        return logprobs(model, of, soft)

    original, logprobs = embedding_to_prefix.fit_soft_token, embedding_to_prefix.soft_logprobs
    monkeypatch.setattr(embedding_to_prefix, "fit_soft_token", fit)
    monkeypatch.setattr(embedding_to_prefix, "soft_logprobs", read)
    study("embedding_to_prefix")

    def people(of):
        return {tuple(tuple(answer) for _, answer in of[i : i + 4]) for i in range(0, len(of), 4)}

    measured = rows["read"][::3]  # each answer of their own before two with other values
    assert len(people(rows["known"])) == 16 and len(people(measured)) == 4
    assert not people(rows["known"]) & people(measured)
    for own, *others in zip(*(rows["read"][i::3] for i in range(3))):
        assert all(prompt == own[0] and answer != own[1] for prompt, answer in others)
