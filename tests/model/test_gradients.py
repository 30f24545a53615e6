"""Gradients of answers' log-probabilities, against finite differences of steering."""

import pytest
import torch
import zoo
from helpers import hooks, random_direction

from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.gradients import answer_gradients
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.steering.add import steer

TALKS = [("How?", "So."), ("How?", "It is so, and so on."), ("Where to, my friend?", "x")]


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "qwen2_moe", "mamba", "bloom"])
def test_the_gradient_along_a_vector_is_the_slope_of_steering(name: str, tokenizer):
    model = zoo.build(name)
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, q), a) for q, a in TALKS]
    found = answer_gradients(model, rows)
    assert hooks(model) == 0 and all(p.grad is None for p in model.parameters())
    vector = random_direction(model)
    for layer, direction in enumerate(vector.directions):
        ends = []
        for coef in (-0.003, 0.003):
            with steer(model, vector, layer=layer, coef=coef / float(direction.norm())):
                ends.append(answer_logprobs(model, rows))
        slope = (ends[1] - ends[0]) / 0.006
        torch.testing.assert_close(found[:, layer] @ direction / direction.norm(), slope, rtol=0.01, atol=1e-3)


def test_layers_parts_of_answers_and_batches_change_no_number(model, tokenizer):
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, q), a) for q, a in TALKS]
    whole = answer_gradients(model, rows)
    with torch.inference_mode():
        alone = torch.cat([answer_gradients(model, [row], layer=[1]) for row in rows])
    torch.testing.assert_close(whole[:, 1:2], alone, rtol=1e-4, atol=1e-6)
    kept = [[0], [1, 3], []]
    parts = answer_gradients(model, rows, kept=kept, layer=1)
    assert parts[2].isnan().all()
    first = (rows[0][0], rows[0][1][:1])  # what follows the tokens that count is in no log-probability
    torch.testing.assert_close(parts[:1], answer_gradients(model, [first], layer=1), rtol=1e-4, atol=1e-6)


def test_weights_without_gradients_are_read_as_others(model, tokenizer):
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, q), a) for q, a in TALKS]
    whole = answer_gradients(model, rows, batch_tokens=64)
    frozen = answer_gradients(model.requires_grad_(False), rows)
    torch.testing.assert_close(whole, frozen, rtol=1e-4, atol=1e-6)
