"""Inspect's evaluations on the tiny model, steered and not, and a judge as its scorer."""

import pytest
from helpers import hooks, random_direction

import persona_vectors as pv
from persona_vectors.model.generation import generate
from persona_vectors.steering.add import steer

QUESTIONS = ["How?", "Why so?", "And when?"]
GREEDY = {"max_tokens": 6, "temperature": 0.0}


@pytest.fixture
def evaluated(tmp_path):
    """Run Inspect on a model; return the log of the run."""
    inspect = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample

    def run(model, scorer, **config):
        task = inspect.Task([Sample(input=question) for question in QUESTIONS], scorer=scorer)
        options = {"log_dir": str(tmp_path), "display": "none", "log_format": "json", **config}
        (log,) = inspect.eval(task, model=model, **options)
        return log

    return run


def length(question: str, answer: str, rubric: str) -> float | None:
    """A judge that abstains once."""
    assert rubric == "Score {question} {answer}"
    return None if question == "Why so?" else float(len(answer))


def answers(log) -> list[str]:
    return [sample.output.completion for sample in log.samples]


def test_answers_are_those_of_the_model_as_it_is_steered(model, tokenizer, trait, evaluated):
    vector, given = random_direction(model), pv.inspect_model(model, tokenizer)
    scorer = pv.inspect_scorer(judge=length, rubric=trait.eval_prompt)
    plain = evaluated(given, scorer, **GREEDY)
    assert plain.status == "success", plain.error
    expected = generate(model, tokenizer, QUESTIONS, max_new_tokens=6, temperature=0)
    assert answers(plain) == expected
    with steer(model, vector, layer=1, coef=9.0):
        steered = evaluated(given, scorer, **GREEDY)
        assert answers(steered) == generate(model, tokenizer, QUESTIONS, max_new_tokens=6, temperature=0) != expected
    assert hooks(model) == 0
    (found,) = plain.results.scores
    assert found.metrics["mean"].value == pytest.approx((len(expected[0]) + len(expected[2])) / 2)
    assert (found.scored_samples, found.unscored_samples) == (2, 1)
    assert all(sample.output.usage.output_tokens in range(1, 7) for sample in plain.samples)


def test_samples_of_one_question_differ_and_a_seed_repeats_them(model, tokenizer, trait, evaluated):
    runs = []
    for _ in range(2):
        given, scorer = pv.inspect_model(model, tokenizer), pv.inspect_scorer(judge=length, rubric=trait.eval_prompt)
        runs.append(answers(evaluated(given, scorer, max_tokens=6, epochs=2, seed=4)))
    assert sorted(runs[0]) == sorted(runs[1]) and len(set(runs[0])) == 6


def test_what_cannot_be_done_is_refused(model, tokenizer, trait, evaluated):
    log = evaluated(pv.inspect_model(model, tokenizer), pv.inspect_scorer(judge=length, rubric=""), top_p=0.5)
    assert log.status == "error" and "top_p: leave it out" in log.error.message


def test_without_inspect_it_says_what_to_install(model, tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "inspect_ai", None)
    with pytest.raises(pv.InputError, match=r"pip install 'persona-vectors-toolkit\[inspect\]'"):
        pv.inspect_model(model, tokenizer)
