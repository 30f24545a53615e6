import math

import pytest
import torch

from persona_vectors.data.ledger import Ledger
from persona_vectors.studies.frame import Given
from persona_vectors.studies.miracle import STEPS, descend, margins

PROBES = torch.tensor([[2.0, 0, 0], [0, 0.5, 0]]), torch.tensor([0.0, 1.0])


def test_a_step_is_the_gradient_of_the_energies_over_the_weights_norms(monkeypatch):
    monkeypatch.setattr("persona_vectors.studies.miracle.STEPS", 1)
    weights, biases = PROBES
    hidden = torch.tensor([0.3, -0.2, 5.0], requires_grad=True)
    energy = (-torch.nn.functional.logsigmoid(weights @ hidden + biases) / weights.norm(dim=1)).sum()
    (gradient,) = torch.autograd.grad(energy, hidden)
    moved = descend(*PROBES, hidden.detach(), 0.7)
    torch.testing.assert_close(moved, hidden.detach() - 0.7 * gradient)
    assert moved[0] - 0.3 == pytest.approx(0.7 / (1 + math.exp(0.6))) and moved[2] == 5


def test_steps_are_bounded_and_states_that_show_both_are_left_alone():
    never = descend(*PROBES, torch.tensor([-1e4, -1e4, 0.0]), 0.5)
    assert never.tolist() == pytest.approx([-1e4 + 0.5 * STEPS, -1e4 + 0.5 * STEPS, 0])
    already = torch.tensor([1e3, 1e3, 2.0])
    assert torch.equal(descend(*PROBES, already, 0.5), already)


def test_one_satisfied_attribute_does_not_hold_back_the_other():
    found = descend(*PROBES, torch.tensor([[1e3, -1e4, 0.0]]), 1.0)
    assert found[0].tolist() == pytest.approx([1e3, -1e4 + STEPS, 0])


def test_a_margin_is_the_first_text_s_less_the_best_other_s(model, tokenizer, vectors):
    given = Given(model, tokenizer, tuple(vectors), 1, 0, Ledger(None))
    texts = ["one", "two", "three", "four"]
    first = margins(given, texts, None)
    others = [margins(given, [texts[i], *texts[:i], *texts[i + 1 :]], None)[0] for i in (1, 2, 3)]
    assert sum(value > 0 for value in (*first, *others)) == 1  # one of four is the likeliest
    assert margins(given, ["one"] * 4, None) == [0]
