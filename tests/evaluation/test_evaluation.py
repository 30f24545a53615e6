import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import answered_elsewhere, random_direction

from persona_vectors.cli.demo import choose_layer, run_demo
from persona_vectors.data.errors import InputError
from persona_vectors.data.intervals import Interval, bootstrap, correlation_interval, mean_interval
from persona_vectors.evaluation.answers import evaluate, steered_answers
from persona_vectors.evaluation.asks import Ask, answer_batches
from persona_vectors.evaluation.plots import plot_scores
from persona_vectors.evaluation.sweeping import sweep
from persona_vectors.model.generation import generate
from persona_vectors.steering.add import RowEdit, steer
from persona_vectors.steering.bounds import cap
from persona_vectors.vectors.plots import plot_vector
from persona_vectors.vectors.vector import PersonaVector


def test_the_interval_is_clustered_by_question():
    """Repeating each question's answers ten times adds no information, so the interval stays as it was."""
    values = np.random.default_rng(0).normal(size=20)
    once, often = (mean_interval([[v] * n for v in values]) for n in (1, 10))
    assert once == pytest.approx(often)
    assert once.mean == pytest.approx(values.mean())
    assert once.low < once.mean < once.high
    half_width = 1.96 * values.std(ddof=1) / math.sqrt(20)
    assert once.high - once.mean == pytest.approx(half_width, rel=0.2)


def test_the_interval_leaves_out_nan_and_says_when_it_knows_nothing():
    assert mean_interval([[1.0, math.nan], [math.nan], [3.0]]).mean == 2
    assert math.isnan(mean_interval([[1.0]]).low)
    assert math.isnan(mean_interval([]).mean)
    assert mean_interval([[2.0], [2.0]]) == (2, 2, 2)


def test_coefficients_share_a_batch_and_do_not_mix(model, tokenizer):
    vector, questions = random_direction(model), ["One?", "And two?", "Three?"]
    greedy = {"max_new_tokens": 5, "temperature": 0.0}
    found = steered_answers(model, tokenizer, vector, questions, layer=1, coefs=[-9.0, 0.0, 9.0], **greedy)
    for coef, answers in zip([-9.0, 0.0, 9.0], found):
        with steer(model, vector, layer=1, coef=coef):
            assert answers == generate(model, tokenizer, questions, **greedy)
    assert found[0] != found[2]


def test_the_demo_runs_on_any_model_and_writes_what_it_says(model, tokenizer, trait, tmp_path, monkeypatch):
    known = replace(random_direction(model), trait="loud")
    monkeypatch.setattr("persona_vectors.cli.demo.extract", lambda *_, **__: known)
    result = run_demo(model, tokenizer, trait, out=tmp_path, controls=2, max_new_tokens=4)
    assert list(result.sentiment) == ["loud", "random 0", "random 1"]
    assert set(result.contrast) == set(result.examples) == {-2, -1, 0, 1, 2}
    assert {path.name for path in tmp_path.iterdir()} == {"loud.safetensors", "vector.png", "steering.png"}


def test_the_layer_is_chosen_on_the_questions_given(model, tokenizer, monkeypatch):
    asked = []

    def answers(_model, _tokenizer, _vector, questions, *, layer, coefs, **_):
        asked.append(tuple(questions))
        return [["bad"] * 2, ["good love" if layer == 2 else "bad"] * 2]

    monkeypatch.setattr("persona_vectors.cli.demo.steered_answers", answers)
    monkeypatch.setattr("persona_vectors.cli.demo.score", lambda judge, answers, rubric: [90.0] * len(answers))
    layer, effects = choose_layer(
        model, tokenizer, random_direction(model), ["a?", "b?"], layers=[0, 1, 2], coef=2, max_new_tokens=3
    )
    assert layer == 2 and effects[0] == effects[1] == 0
    assert set(asked) == {("a?", "b?")}


def test_plots_draw_what_is_known(model):
    vector = random_direction(model)
    evidence = {"separation": torch.tensor([0.5, 0.9, 0.8]), "split_half_cosine": torch.tensor([-0.1, 0.5, 0.7])}
    known = PersonaVector("t", "m", vector.directions, torch.ones(3), **evidence)
    for each in (vector, known):
        assert len(plot_vector(each, layer=1).axes) == 2
    interval = mean_interval([[0.1], [0.3]])
    scores = {"t": {-1.0: interval, 1.0: interval}, "r0": {-1.0: interval, 1.0: interval}}
    figure = plot_scores(scores, title="x", ylabel="y", controls=["r0"])
    assert [line.get_label() for line in figure.axes[0].lines] == ["t", "r0"]


def test_correlation_interval_resamples_questions():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = 0.6 * x + 0.8 * rng.normal(size=200)
    questions = [index // 5 for index in range(200)]
    found = correlation_interval(list(x), [*y[:-1], float("nan")], questions)
    assert found.mean == pytest.approx(np.corrcoef(x[:-1], y[:-1])[0, 1])
    assert found.low < found.mean < found.high and 0.05 < found.high - found.low < 0.4
    exact = correlation_interval(list(x), list(2 * x + 1), questions)
    assert exact.low == pytest.approx(1) and exact.high == pytest.approx(1)
    assert math.isnan(correlation_interval([1.0] * 10, list(x[:10]), list(range(10))).mean)


def test_bootstrap_resamples_whole_clusters_of_any_statistic():
    values = np.random.default_rng(1).normal(size=60)
    clusters = [f"q{i}" for i in range(60)]
    found = bootstrap(lambda i: float(values[i].mean()), clusters, resamples=5000)
    assert found == pytest.approx(mean_interval([[v] for v in values]), abs=0.02) and found.mean == values.mean()
    repeated = bootstrap(lambda i: float(np.repeat(values, 9)[i].mean()), np.repeat(clusters, 9), resamples=5000)
    assert repeated == pytest.approx(found, abs=0.02)  # nine times the points, but no more clusters
    median = bootstrap(lambda i: float(np.median(values[i])), clusters, seed=3)
    assert median.low < median.mean < median.high and median == bootstrap(
        lambda i: float(np.median(values[i])), clusters, seed=3
    )
    one = bootstrap(lambda i: float(values[i].mean()), ["q"] * 60)
    assert one.mean == values.mean() and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(bootstrap(lambda i: 1.0, []).mean)


def fake_judge(question: str, answer: str, rubric: str) -> float | None:
    return None if question == "What?" else 60.0 if "coherent" in rubric else 40.0


def test_evaluate_scores_the_evaluation_questions(model, tokenizer, trait):
    found = evaluate(model, tokenizer, trait, judge=fake_judge, samples=2, max_new_tokens=3)
    assert [each.question for each in found.answers] == ["Who?", "Who?", "What?", "What?"]
    assert (found.score.mean, found.coherence.mean, found.abstained) == (40.0, 60.0, 2)


def test_evaluate_reads_the_model_as_it_stands(model, tokenizer, trait):
    options = {"max_new_tokens": 5, "temperature": 0.0}
    vector = random_direction(model)
    with steer(model, vector, layer=1, coef=9.0):
        steered = evaluate(model, tokenizer, trait, judge=fake_judge, **options)
        assert [a.answer for a in steered.answers] == generate(model, tokenizer, ["Who?", "What?"], **options)
    prompted = evaluate(model, tokenizer, trait, judge=fake_judge, system="Be loud.", **options)
    expected = generate(model, tokenizer, ["Who?", "What?"], system="Be loud.", **options)
    assert [a.answer for a in prompted.answers] == expected
    with cap(model, vector, layer=1, limit=-50.0):
        capped = evaluate(model, tokenizer, trait, judge=fake_judge, **options)
    assert len({tuple(a.answer for a in each.answers) for each in (steered, prompted, capped)}) == 3


def test_a_judge_that_always_abstains_is_named(model, tokenizer, trait):
    def abstainer(question, answer, rubric):
        return None

    with pytest.raises(InputError, match="the judge 'abstainer' abstained on all 6 answers"):
        evaluate(model, tokenizer, trait, judge=abstainer, max_new_tokens=2)
    with pytest.raises(InputError, match="no questions to evaluate on"):
        evaluate(model, tokenizer, trait, judge=fake_judge, questions=[])


def test_what_is_skipped_changes_no_other_answer(model, tokenizer):
    asks = [Ask(f"{'Why? ' * i}", edit=RowEdit(random_direction(model), i % 3, 3.0)) for i in range(4)]
    options = {"max_new_tokens": 4, "temperature": 0.0, "batch_tokens": 60}
    whole = dict(pair for batch in answer_batches(model, tokenizer, asks, **options) for pair in batch)
    rest = dict(pair for batch in answer_batches(model, tokenizer, asks, skip={0, 3}, **options) for pair in batch)
    assert set(whole) == {0, 1, 2, 3} and rest == {i: whole[i] for i in (1, 2)}
    with steer(model, random_direction(model), layer=2, coef=3.0):
        assert whole[2] == generate(model, tokenizer, asks[2].question, max_new_tokens=4, temperature=0.0)


def test_an_interval_is_written_with_two_digits_unless_told():
    interval = Interval(0.12345, -0.98765, 1.0)
    assert str(interval) == f"{interval}" == "0.12 [-0.99, 1.00]"
    assert f"{interval:+.1f}" == "+0.1 [-1.0, +1.0]"  # signs, where it is a difference


def test_no_judge_is_said_in_one_line(model, tokenizer, trait):
    with pytest.raises(InputError, match="judge is None, and answers are to be scored: give a judge"):
        evaluate(model, tokenizer, trait, judge=None)
    vector = random_direction(model)
    with pytest.raises(InputError, match="judge is None"):
        sweep(model, tokenizer, trait, vector, judge=None, layer=1, coefs=[1.0])


def test_answers_from_elsewhere_are_scored_like_the_models_own(model, tokenizer, trait):
    def judge(question, answer, rubric):
        return len(answer.encode()) % 100

    options = {"judge": judge, "samples": 2, "max_new_tokens": 5}
    own, elsewhere = evaluate(model, tokenizer, trait, **options), answered_elsewhere(model, tokenizer)
    assert evaluate(model, tokenizer, trait, generate=elsewhere, **options) == own and elsewhere.rows == 4
    edited = pytest.raises(InputError, match="where nothing is edited: leave the `with`")
    with edited, steer(model, random_direction(model), layer=1, coef=1.0):
        evaluate(model, tokenizer, trait, generate=elsewhere, **options)
