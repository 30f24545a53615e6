import sys

import pytest
import torch
import zoo
from helpers import plain_logprob

import persona_vectors as pv
from persona_vectors.steering.add import steer
from persona_vectors.training.tuned import tuned
from persona_vectors.vectors.vector import PersonaVector

ROWS = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]}]
MANY = {"epochs": 10, "learning_rate": 0.1}


def state(model):
    return {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[n][0], other[n][0]) and one[n][1] == other[n][1] for n in one
    )


def test_the_model_has_learnt_the_answer_inside_and_is_as_before_afterwards(model):
    next(model.parameters()).requires_grad_(False)
    before, plain = state(model), plain_logprob(model, [5, 6, 7], [8, 9])
    for _ in range(2):  # wrapped a second time too
        with tuned(model, ROWS, **MANY):
            assert plain_logprob(model, [5, 6, 7], [8, 9]) > plain + 0.4 and not model.training
        assert same(state(model), before) and plain_logprob(model, [5, 6, 7], [8, 9]) == plain
        assert not hasattr(model, "peft_config")


def test_the_same_seed_trains_the_same_and_no_epochs_train_nothing(model):
    def learnt(**options):
        with tuned(model, ROWS, **options):
            return plain_logprob(model, [5, 6, 7], [8, 9])

    assert learnt(seed=1) == learnt(seed=1) != learnt(seed=2)
    assert learnt(epochs=0) == pytest.approx(plain_logprob(model, [5, 6, 7], [8, 9]), abs=1e-6)


def test_an_edit_while_it_trains_is_gone_when_it_is_used(model):
    answer = model.get_output_embeddings().weight[[8, 9]].detach().sum(dim=0)
    vector = PersonaVector(trait="t", model="m", directions=answer.repeat(zoo.BLOCKS, 1))
    with tuned(model, ROWS, **MANY):
        taught = plain_logprob(model, [5, 6, 7], [8, 9])
    with tuned(model, ROWS, during=steer(model, vector, layer=zoo.BLOCKS - 1, coef=1e3), **MANY):
        prevented = plain_logprob(model, [5, 6, 7], [8, 9])  # the edit said the answer, and there was less to learn
    assert prevented < taught - 0.1


def test_after_an_error_the_model_is_as_before(model):
    before = state(model)
    with pytest.raises(KeyError), tuned(model, ROWS):
        raise KeyError
    with pytest.raises(IndexError), tuned(model, [{"input_ids": [10**6], "labels": [1]}]):
        pass
    assert same(state(model), before) and not model.training


def test_without_peft_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(pv.InputError, match="peft is missing: pip install"), tuned(model, ROWS):
        pass
