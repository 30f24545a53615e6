"""Strengths by their cost on neutral text, against plain forwards."""

import math

import pytest
import torch
from helpers import block_outputs, random_direction, use

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.data.texts import neutral_texts
from persona_vectors.evaluation.cost import kl_cost, strength_at
from persona_vectors.model.prompts import chat_prompt, encode_answer

TEXTS = neutral_texts()[:2]


def plain_kls(model, tokenizer, vector, **options) -> list[float]:
    """KL(plain | steered) at every answer token, one text at a time."""
    kls = []
    for question, answer in TEXTS:
        prompt, reply = encode_answer(tokenizer, chat_prompt(tokenizer, question), answer)
        both = []
        ids = torch.tensor([prompt + reply])
        for edit in ({"coef": 0.0, "layer": 1}, options):
            with pv.steer(model, vector, **edit), torch.no_grad():
                both.append(model(ids).logits[0, len(prompt) - 1 : -1].double().softmax(dim=-1))
        kls += (both[0] * (both[0] / both[1]).log()).sum(dim=-1).tolist()
    return kls


def test_at_the_coefficient_the_percentile_is_the_one_asked_for(model, tokenizer):
    vector, values = random_direction(model), []
    for kl, percentile in ((0.001, 95.0), (0.001, 50.0), (0.003, 95.0)):
        coef = pv.coef_at_kl(model, tokenizer, vector, layer=1, kl=kl, percentile=percentile, texts=TEXTS)
        kls = torch.tensor(plain_kls(model, tokenizer, vector, layer=1, coef=coef), dtype=torch.float64)
        assert float(kls.quantile(percentile / 100)) == pytest.approx(kl, rel=0.03)
        values.append(coef)
    assert values[1] > values[0] and values[2] > values[0]
    options = {"layer": 1, "kl": 0.001, "texts": TEXTS}
    assert pv.coef_at_kl(model, tokenizer, 10 * vector, **options) == pytest.approx(values[0] / 10, rel=0.02)
    told = vector.with_use(use("steer", 1))
    assert pv.coef_at_kl(model, tokenizer, told, kl=0.001, texts=TEXTS) == values[0]


def test_any_edit_has_a_cost_and_a_strength_at_it(model, tokenizer):
    vector = random_direction(model)
    cost = kl_cost(model, tokenizer, lambda s: pv.steer(model, vector, layer=1, coef=s), texts=TEXTS)
    coef = pv.coef_at_kl(model, tokenizer, vector, layer=1, kl=0.001, texts=TEXTS)
    assert cost(coef) == pytest.approx(0.001, rel=0.03) and cost(0.0) == pytest.approx(0, abs=1e-8)
    assert strength_at(cost, 0.001, of="it") == pytest.approx(coef, rel=0.01)
    low = float(vector.project(next_states(model, tokenizer), layer=1).min())
    bounded = kl_cost(model, tokenizer, lambda s: pv.floor(model, vector, layer=1, limit=low + s), texts=TEXTS)
    assert bounded(1e-9) == pytest.approx(0, abs=1e-8)
    assert bounded(strength_at(bounded, 0.0005, of="it")) == pytest.approx(0.0005, rel=0.03)
    tokens: list[float] = []  # a cost in closed form: half of the square
    found = strength_at(lambda s: tokens.append(s) or s**2 / 2, 8.0, of="it", tolerance=1e-6)
    assert found == pytest.approx(4.0, rel=1e-5) and len(tokens) < 8
    with pytest.raises(InputError, match="no strength of a constant has a KL of 1: give another kl"):
        strength_at(lambda _: 2.0, 1.0, of="a constant")


def next_states(model, tokenizer) -> torch.Tensor:
    """What block 1 puts out for the neutral texts' prompts and answers."""
    states = []
    for question, answer in TEXTS:
        prompt, reply = encode_answer(tokenizer, chat_prompt(tokenizer, question), answer)
        states.append(block_outputs(model, [*prompt, *reply])[1])
    return torch.cat(states)


def test_a_cost_that_cannot_be_reached_is_said(model, tokenizer):
    vector = random_direction(model)
    with pytest.raises(InputError, match=r"no strength of .* at layer 1 has a KL of 1e\+06: give another kl"):
        pv.coef_at_kl(model, tokenizer, vector, layer=1, kl=1e6, texts=TEXTS)
    with pytest.raises(InputError, match="has a KL of"):
        pv.coef_at_kl(model, tokenizer, 0 * vector, layer=1, texts=TEXTS)
    for wrong in ({"kl": 0.0}, {"kl": math.nan}, {"percentile": 101}):
        with pytest.raises(InputError, match="give a positive number, and one up to 100"):
            pv.coef_at_kl(model, tokenizer, vector, layer=1, **wrong)
    with pytest.raises(InputError, match="stores no layer to steer at"):
        pv.coef_at_kl(model, tokenizer, vector)
