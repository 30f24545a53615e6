import csv
import json
from dataclasses import replace

import pytest
import torch
from helpers import random_direction

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import writing
from persona_vectors.data.intervals import mean_interval
from persona_vectors.data.ledger import Ledger
from persona_vectors.evaluation.answers import steered_answers
from persona_vectors.evaluation.likelihood import neutral_perplexity
from persona_vectors.evaluation.plots import plot_sweep
from persona_vectors.evaluation.sweeping import sweep
from persona_vectors.model import generation
from persona_vectors.model.generation import generate
from persona_vectors.steering.add import steer

OPTIONS = {"layer": [0, 1, 2], "coefs": [-4, 0, 4], "controls": 4, "max_new_tokens": 4, "temperature": 0.0}


@pytest.fixture
def vector(model):
    return replace(random_direction(model), trait="loud", residual_norms=torch.ones(3))


def letters(question: str, answer: str, rubric: str) -> float:
    """A score that any change of the answer changes."""
    return 80.0 if "coherent" in rubric else sum(answer.encode()) % 101


def test_a_sweep_reports_what_one_by_one_steering_gives(model, tokenizer, trait, vector):
    found = sweep(model, tokenizer, trait, vector, judge=letters, **OPTIONS)
    by = {(p.stage, p.name, p.layer, p.strength): p for p in found.points}
    questions = {"choose": trait.questions.extract, "report": trait.questions.eval}
    for stage, layer in (("choose", 0), ("choose", 2), ("report", found.layer)):
        options = {"layer": layer, "coefs": [0.0, -4.0], "max_new_tokens": 4, "temperature": 0.0}
        plain, steered = steered_answers(model, tokenizer, vector, questions[stage], **options)
        scores = [[letters("", answer, "") for answer in answers] for answers in (plain, steered)]
        point = by[stage, "loud", layer, -4.0]
        assert point.score.mean == pytest.approx(sum(scores[1]) / len(scores[1]))
        moves = [after - before for before, after in zip(*scores)]
        assert point.effect.mean == pytest.approx(sum(moves) / len(moves))
        assert point.wrong_way == sum(move > 0 for move in moves) / len(moves)
        assert point.coherence.mean == 80
    best = max((p for p in found.stage("choose") if p.strength > 0), key=lambda p: p.score.mean)
    assert (found.layer, found.strength) == (best.layer, 4.0)
    use, own = found.use(source="a test"), by["report", "loud", best.layer, 4.0]
    assert (use.layer, use.coef, use.effect, use.coherent) == (best.layer, 4.0, own.effect, (-4.0, 4.0))
    assert use.null == max((p.effect.mean for p in found.controls), default=None)
    assert use.evidence == found.works == (own.effect.low > 0 and use.null is not None and own.effect.mean > use.null)
    broken = replace(found, gate=90.0)
    assert broken.use().coherent == (0.0, 0.0) and use.source == "a test"


def test_controls_are_in_it_by_default(model, tokenizer, trait, vector):
    found = sweep(model, tokenizer, trait, vector, judge=letters, **{**OPTIONS, "coefs": [4]})
    names = [(p.name, p.strength) for p in found.stage("report")]
    controls = [("random 0", 4), ("random 1", 4), ("covariance 0", 4), ("covariance 1", 4)]
    assert names == [("plain", 0), ("own system prompt", 0), ("loud", -4), ("loud", 4), *controls]
    assert [p.name for p in found.controls] == [name for name, _ in controls]
    prompts = []

    def watching(question, answer, rubric):
        return 80.0

    watching.batch = lambda answers, rubric: [prompts.append(a.pair) or 80.0 for a in answers]
    sweep(model, tokenizer, trait, vector, judge=watching, **OPTIONS)
    assert {0, 1} <= set(prompts)  # the instruction pairs of the ceiling, so that a contrast judge leaves them out


def test_the_choice_never_sees_the_evaluation_questions(model, tokenizer, trait, vector):
    """Turning every score on the evaluation questions round changes the report and not the choice; on the extraction
    questions it changes the choice."""

    def turned(where: tuple[str, ...]):
        def judge(question: str, answer: str, rubric: str) -> float:
            value = letters(question, answer, rubric)
            return value if "coherent" in rubric or question not in where else 100 - value

        return judge

    runs = [
        sweep(model, tokenizer, trait, vector, judge=turned(where), **OPTIONS)
        for where in ((), trait.questions.eval, trait.questions.extract)
    ]
    plain, turned_report, turned_choice = [(run.layer, run.strength) for run in runs]
    assert plain == turned_report != turned_choice
    assert runs[0].stage("choose") == runs[1].stage("choose")
    assert [p.score for p in runs[0].stage("report")] != [p.score for p in runs[1].stage("report")]


@pytest.mark.parametrize("positions", ["all", "response"])
def test_the_evidence_is_of_the_edit_that_is_named(positions, model, tokenizer, trait, vector):
    """The reported answers and perplexity are those inside `steer` with the sweep's own layer, coef and positions."""
    found = sweep(model, tokenizer, trait, vector, judge=letters, positions=positions, **OPTIONS)
    assert {row["positions"] for row in found.rows()} == {positions}
    (point,) = [p for p in found.stage("report") if p.name == "loud" and p.coef == found.coef]
    with steer(model, vector, layer=found.layer, coef=found.coef, positions=found.positions):
        answers = [generate(model, tokenizer, q, max_new_tokens=4, temperature=0) for q in trait.questions.eval]
        perplexity = neutral_perplexity(model, tokenizer)
    scores = [letters("", answer, "") for answer in answers]
    assert point.score.mean == pytest.approx(sum(scores) / len(scores))
    assert perplexity == pytest.approx([point.perplexity], rel=1e-4)


def test_the_report_takes_several_answers_to_a_question_and_says_so(model, tokenizer, trait, vector, tmp_path):
    options = {**OPTIONS, "temperature": 1.0, "out": tmp_path / "a.jsonl"}
    found = sweep(model, tokenizer, trait, vector, judge=letters, **options)
    assert {p.samples for p in found.stage("choose")} == {1} and {p.samples for p in found.stage("report")} == {3}
    ledger = Ledger(tmp_path / "a.jsonl", {}).found.values()
    plain = [e for e in ledger if e.get("stage") == "report" and "vector" not in e and e["system"] is None]
    by_question = {q: [e["answer"] for e in plain if e["question"] == q] for q in trait.questions.eval}
    assert all(len(answers) == 3 and len(set(answers)) > 1 for answers in by_question.values())
    scores = [[letters("", answer, "") for answer in answers] for answers in by_question.values()]
    (point,) = [p for p in found.stage("report") if p.name == "plain"]
    assert point.score == mean_interval(scores)


def test_doses_are_fractions_of_the_residual_norm(model, tokenizer, trait, vector):
    found = sweep(model, tokenizer, trait, vector, judge=letters, **{**OPTIONS, "coefs": None, "doses": [0.5]})
    assert found.unit == "dose" and found.strength == 0.5
    assert found.coef == pytest.approx(0.5 / float(vector.direction(found.layer).norm()))


class Killed(Exception):
    pass


def test_a_killed_sweep_goes_on_and_repeats_no_answer(model, tokenizer, trait, vector, tmp_path, monkeypatch):
    batches: list[int] = []
    original, limit = generation.generate_tokens, 5

    def counted(model, tokenizer, prompts, **options):
        if len(batches) == limit:
            raise Killed
        batches.append(len(prompts))
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr(generation, "generate_tokens", counted)
    path = tmp_path / "answers.jsonl"
    options = {**OPTIONS, "batch_tokens": 60, "judge": letters}
    with pytest.raises(Killed):
        sweep(model, tokenizer, trait, vector, out=path, **options)
    with path.open("a") as file:
        file.write('{"key": "cut')
    limit = -1
    resumed = sweep(model, tokenizer, trait, vector, out=path, **options)
    assert sum(batches) == 7 * len(trait.questions.extract) + 8 * len(trait.questions.eval)
    batches.clear()
    assert sweep(model, tokenizer, trait, vector, out=path, **options) == resumed
    assert batches == []
    assert sweep(model, tokenizer, trait, vector, **options) == resumed  # as a run that nothing stopped


def test_two_sweeps_do_not_write_one_file(model, tokenizer, trait, vector, tmp_path):
    path = tmp_path / "a.jsonl"
    with writing(path), pytest.raises(InputError, match=r"another run is writing .*a.jsonl: wait for its end"):
        sweep(model, tokenizer, trait, vector, judge=letters, out=path, **OPTIONS)


def test_a_judge_that_fails_loses_no_answer(model, tokenizer, trait, vector, tmp_path):
    def down(question, answer, rubric):
        raise Killed

    down.name = "letters"
    path = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        sweep(model, tokenizer, trait, vector, judge=down, out=path, **OPTIONS)
    kept = [json.loads(line) for line in path.read_text().splitlines()[2:]]
    assert kept and all("answer" in entry for entry in kept)
    sweep(model, tokenizer, trait, vector, judge=letters, out=path, **OPTIONS)
    entries = [json.loads(line) for line in path.read_text().splitlines()[2:]]
    answered = [entry["key"] for entry in entries if "answer" in entry]
    assert len(answered) == len(set(answered))


def test_bad_sweeps_say_what_to_do(model, tokenizer, trait, vector, tmp_path):
    def dull(question, answer, rubric):
        return 10.0

    with pytest.raises(
        InputError, match=r"no layer and strength of 'loud' keeps the coherence at 50 \(the best has 10"
    ):
        sweep(model, tokenizer, trait, vector, judge=dull, **OPTIONS)
    with pytest.raises(InputError, match="coefs= or doses= with a positive one"):
        sweep(model, tokenizer, trait, vector, judge=dull, **{**OPTIONS, "coefs": [-1]})
    with pytest.raises(InputError, match="abstained on all"):
        sweep(model, tokenizer, trait, vector, judge=lambda *_: None, **OPTIONS)
    sweep(model, tokenizer, trait, vector, judge=letters, out=tmp_path / "a.jsonl", **OPTIONS)
    with pytest.raises(InputError, match="was made with max_new_tokens=4, not 5: give the same settings"):
        sweep(
            model, tokenizer, trait, vector, judge=letters, out=tmp_path / "a.jsonl", **{**OPTIONS, "max_new_tokens": 5}
        )


def test_a_sweep_becomes_a_table_and_a_plot(model, tokenizer, trait, vector, tmp_path):
    found = sweep(model, tokenizer, trait, vector, judge=letters, **OPTIONS)
    found.save_csv(tmp_path / "sweep.csv")
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert len(rows) == len(found.points)
    assert float(rows[-1]["effect_low"]) == found.points[-1].effect.low
    heat, response, *_ = plot_sweep(found).axes
    assert heat.images[0].get_array().shape == (2, 3)  # strengths x layers
    assert response.get_legend_handles_labels()[1] == ["loud", "coherence", "4 random vectors", "own system prompt"]


def test_a_ledger_merges_entries_and_passes_over_a_cut_line(tmp_path):
    path = tmp_path / "l.jsonl"
    Ledger(path, {"a": 1}).add([{"key": "x", "answer": "y"}])
    with path.open("a") as file:
        file.write('{"key": "z", "ans')
    Ledger(path, {"a": 1}).add([{"key": "x", "score": 3}])
    assert Ledger(path, {"a": 1}).found == {"x": {"key": "x", "answer": "y", "score": 3}}
    assert Ledger(None).found == {}
