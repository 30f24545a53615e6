"""Strengths by their cost on neutral text, against plain forwards."""

import math

import pytest
import torch
from helpers import random_direction, use

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.data.texts import neutral_texts
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


def test_a_cost_that_cannot_be_reached_is_said(model, tokenizer):
    vector = random_direction(model)
    with pytest.raises(InputError, match=r"has a KL of 1e\+06 at layer 1: give another kl"):
        pv.coef_at_kl(model, tokenizer, vector, layer=1, kl=1e6, texts=TEXTS)
    with pytest.raises(InputError, match="has a KL of"):
        pv.coef_at_kl(model, tokenizer, 0 * vector, layer=1, texts=TEXTS)
    for wrong in ({"kl": 0.0}, {"kl": math.nan}, {"percentile": 101}):
        with pytest.raises(InputError, match="give a positive number, and one up to 100"):
            pv.coef_at_kl(model, tokenizer, vector, layer=1, **wrong)
    with pytest.raises(InputError, match="stores no layer to steer at"):
        pv.coef_at_kl(model, tokenizer, vector)
