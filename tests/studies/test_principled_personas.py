import numpy as np
import pytest
import torch
from helpers import make_tokenizer

from persona_vectors.data.ledger import Ledger
from persona_vectors.evaluation import likelihood
from persona_vectors.evaluation.psychometrics import level_agreement, robustness
from persona_vectors.studies.frame import Given
from persona_vectors.studies.principled_personas import FACTS, personas, utilities


def test_robustness_is_the_worst_attribute_s_and_never_their_mean():
    expert = np.array([2.0, 2.0])
    variants = np.array([[2.0, 2.0], [5.0, 5.0], [1.0, 2.0]])
    assert robustness(expert, variants) == -0.5
    assert robustness(expert, variants[:1]) == 0


def test_fidelity_is_the_rank_agreement_with_the_levels():
    levels = np.array([[0.0, 0], [1, 1], [2, 2], [3, 3]])
    assert level_agreement(levels) == pytest.approx(1)
    assert level_agreement(levels[::-1]) == pytest.approx(-1)
    assert level_agreement(levels[[0, 1, 3, 2]]) == pytest.approx(4 / 6)  # five of six pairs agree


def test_right_answers_are_not_wrong_ones_and_personas_are_of_the_domain():
    for domain, facts in FACTS.items():
        assert all(len(set(answers)) == 4 for _, *answers in facts)
        assert all(domain in text for text in personas(domain)["attributes"] + personas(domain)["levels"])
        assert not any(domain in str(text) for text in personas(domain)["others"] + personas(domain)["same"])


def test_a_utility_is_the_right_answer_s_less_the_mean_of_the_wrong_ones(model, monkeypatch):
    """A model that likes a word of its system prompt, and longer answers less."""

    def liked(_model, rows, **_):
        texts = [(make_tokenizer().decode(prompt), make_tokenizer().decode(answer)) for prompt, answer in rows]
        return torch.tensor([3.0 * (answer in prompt) - len(answer) for prompt, answer in texts])

    monkeypatch.setattr(likelihood, "answer_logprobs", liked)
    given = Given(model, make_tokenizer(), (), 1, 0, Ledger(None))
    questions = [("What?", "abc", "d", "ef", "ghi"), ("Who?", "k", "lm", "no", "pq")]
    assert utilities(given, questions, [None, "Say abc."]) == [[-1.0, 1.0], [2.0, 1.0]]
