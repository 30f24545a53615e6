import pytest
import torch
from helpers import plain_logprob

from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.training.soft import SoftToken, fit_soft_token, soft_logprobs, weighted_history

ROWS = [([5, 6, 7, 8], [9, 10]), ([5, 11], [12, 13, 14]), ([5, 6, 7, 8, 9, 10], [3])]


def test_rows_of_any_length_have_the_plain_log_probabilities(model):
    found = soft_logprobs(model, ROWS).detach()
    torch.testing.assert_close(found, answer_logprobs(model, ROWS), atol=1e-5, rtol=1e-5)
    assert float(found[0]) == pytest.approx(float(plain_logprob(model, *ROWS[0])), abs=1e-4)


def test_a_soft_token_that_is_a_token_s_embedding_is_that_token_behind_the_first(model):
    soft = model.get_input_embeddings().weight[[20, 21, 22]].detach()
    written = [([prompt[0], token, *prompt[1:]], answer) for (prompt, answer), token in zip(ROWS, (20, 21, 22))]
    torch.testing.assert_close(soft_logprobs(model, ROWS, soft), soft_logprobs(model, written), atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_soft_token_of_their_own_row(model):
    soft = torch.zeros(3, model.config.hidden_size, requires_grad=True)
    soft_logprobs(model, ROWS, soft)[1].backward()
    sizes = soft.grad.norm(dim=1)
    assert sizes[1] > 0 and sizes[0] == sizes[2] == 0


def test_a_map_learns_which_vector_goes_with_which_answer_and_leaves_the_model(model):
    """Two vectors, each with an answer of its own to the same prompt: no map without the vector can tell them."""
    model.get_output_embeddings().weight.data *= 30  # as built, it gives all tokens nearly the same
    before = [parameter.clone() for parameter in model.parameters()]
    rows = [([5, 6, 7], [30]), ([5, 6, 7], [31])] * 8
    vectors = torch.eye(2).repeat(8, 1)
    made = fit_soft_token(model, rows, vectors, epochs=60, learning_rate=1e-2)
    with torch.no_grad():
        own, other = (soft_logprobs(model, rows[:2], made(each)) for each in (vectors[:2], vectors[:2].flip(0)))
    assert bool((own > other + 1).all())
    assert all(bool((a == b).all()) for a, b in zip(before, model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_map_does_not_know_the_vectors_units(model):
    vectors = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for given in (vectors, 50 * vectors + 3):
        torch.manual_seed(0)
        found.append(SoftToken(model, given)(given))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_a_history_is_weighted_by_likeness_to_the_question():
    history = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    torch.testing.assert_close(
        weighted_history(torch.tensor([5.0, 0]), history, evenly=True), torch.tensor([0.0, 1 / 3])
    )
    weights = torch.tensor([10.0, 0, -10]).softmax(dim=0)
    torch.testing.assert_close(weighted_history(torch.tensor([5.0, 0]), history, evenly=False), weights @ history)
