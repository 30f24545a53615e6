import math

import pytest
import torch

from persona_vectors.evaluation.cost import coef_at, edit_success, token_kls


def test_an_edit_s_success_is_the_preference_where_the_wanted_statement_did_not_lose():
    pos, neg = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -1.0 - math.log(3), -4.0])
    before = torch.tensor([-2.0, -1.0, -3.0 + math.log(2)])
    expected = [0.5, 0.75, 0.5 / (1 + math.exp(-1))]  # the last one lost half of its probability
    assert edit_success(pos, neg, before).tolist() == pytest.approx(expected)


def test_a_model_that_says_neither_any_more_has_no_success():
    assert float(edit_success(torch.tensor(-30.0), torch.tensor(-60.0), torch.tensor(-1.0))) < 1e-12


def test_the_drawdown_is_the_mean_over_tokens_of_the_divergence():
    plain = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    edited = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    one = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(token_kls([plain], [edited]).mean()) == pytest.approx(one / 2)
    assert float(token_kls([plain, plain[:1]], [edited, edited[:1]]).mean()) == pytest.approx(2 * one / 3)
    assert float(token_kls([plain], [plain]).mean()) == 0


def test_equal_success_is_found_by_the_coefficient():
    def success(coef):
        return 0.2 + 0.1 * coef

    assert coef_at(success, 0.45, full=8.0) == pytest.approx(2.5, abs=0.04)
    assert coef_at(success, 0.45, full=1.0) == pytest.approx(2.5, abs=0.04)
    assert coef_at(success, 0.1, full=8.0) == 0
    assert math.isnan(coef_at(success, 2.0, full=4.0))
    assert coef_at(lambda coef: coef * (2 - coef), 0.75, full=1.0) == pytest.approx(0.5, abs=0.02)  # 4 is too much
