"""Judging beside generation: what waits for what, what is kept, and that the answers are the same."""

import threading
import time
import zlib

import pytest
from helpers import random_direction

from persona_vectors.evaluation import beside
from persona_vectors.evaluation.answers import evaluate
from persona_vectors.evaluation.beside import AHEAD, score_batches
from persona_vectors.evaluation.judge import Answer, score
from persona_vectors.evaluation.judges import score_both
from persona_vectors.evaluation.sweeping import sweep
from persona_vectors.extraction.difference import extract
from persona_vectors.model import generation
from persona_vectors.model.hooks import edits_are_active
from persona_vectors.steering.add import steer

SMALL = {"samples": 1, "max_new_tokens": 3, "batch_tokens": 300, "min_pairs": 2}
WAIT = 20.0
"""Seconds after which a test fails that waits for another thread."""


class Remote:
    """A judge somewhere else: 80 or 20 by the answer's text. `meanwhile` is called first, with the answers."""

    name, remote = "elsewhere", True

    def __init__(self, meanwhile=lambda answers: None, remote: bool = True):
        self.meanwhile, self.remote = meanwhile, remote

    def __call__(self, question: str, answer: str, rubric: str) -> float:
        return 80.0 if "coherent" in rubric or zlib.crc32(answer.encode()) % 2 else 20.0

    def batch(self, answers: list[Answer], rubric: str) -> list[float]:
        self.meanwhile(answers)
        return [self(answer.question, answer.answer, rubric) for answer in answers]


@pytest.fixture
def begun(monkeypatch):
    """A condition with the number of batches whose generation has begun, in `begun.count`."""
    condition, original = threading.Condition(), generation.generate_tokens
    condition.count = 0

    def counted(*args, **options):
        with condition:
            condition.count += 1
            condition.notify_all()
        return original(*args, **options)

    monkeypatch.setattr(generation, "generate_tokens", counted)
    return condition


def test_the_next_batch_is_generated_while_a_remote_judge_scores(model, tokenizer, trait, tmp_path, begun):
    plain = extract(model, tokenizer, trait, judge=Remote(remote=False), rollouts=tmp_path / "plain", **SMALL)
    batches, begun.count = begun.count, 0
    assert batches > 4

    def wait_for_the_next(answers):
        with begun:
            seen = begun.count
            assert seen == batches or begun.wait_for(lambda: begun.count > seen, WAIT), "generation waits for the judge"

    found = extract(model, tokenizer, trait, judge=Remote(wait_for_the_next), rollouts=tmp_path / "beside", **SMALL)
    assert (tmp_path / "beside").read_bytes() == (tmp_path / "plain").read_bytes()
    assert found.directions.equal(plain.directions) and found.separation.equal(plain.separation)


def test_generation_waits_for_a_judge_that_is_far_behind():
    made, free = [], threading.Event()

    def batches():
        for i in range(3 * AHEAD):
            made.append(i)
            yield i

    def work(i: int) -> int:
        assert free.wait(WAIT)
        return -i

    kept: list[tuple[int, int]] = []
    runner = threading.Thread(target=lambda: score_batches(batches(), work, lambda *x: kept.append(x), remote=True))
    runner.start()
    time.sleep(0.2)
    assert len(made) == AHEAD + 1 and not kept
    free.set()
    runner.join(WAIT)
    assert kept == [(i, -i) for i in range(3 * AHEAD)]


def test_both_rubrics_are_judged_at_the_same_time(model, tokenizer):
    both = threading.Barrier(2, timeout=WAIT)
    judge = Remote(lambda answers: both.wait())
    assert score_both(model, tokenizer, judge, [Answer("q", "a")], "r") == [(judge("q", "a", "r"), 80.0)]


def test_a_remote_judge_pauses_no_edits_and_a_local_one_does(model):
    found = []
    for remote in (True, False):
        with steer(model, random_direction(model), layer=1, coef=1.0):
            score(Remote(lambda _: found.append(edits_are_active(model)), remote=remote), [Answer("q", "a")], "r")
            model(input_ids=model.dummy_inputs["input_ids"])
    assert found == [True, False]


@pytest.mark.parametrize("remote", [True, False])
def test_an_error_of_the_judge_ends_the_run_and_what_came_before_is_kept(
    model, tokenizer, trait, tmp_path, begun, monkeypatch, remote: bool
):
    monkeypatch.setattr(beside, "AHEAD", 1)
    whole, path = tmp_path / "whole", tmp_path / "r.jsonl"
    extract(model, tokenizer, trait, judge=Remote(remote=remote), rollouts=whole, **SMALL)
    lines, batches = whole.read_text().splitlines()[1:], begun.count
    begun.count, bad = 0, lines[len(lines) // 3]

    def fail(answers):
        if any(f'"answer":"{answer.answer}"' in bad for answer in answers):
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        extract(model, tokenizer, trait, judge=Remote(fail, remote=remote), rollouts=path, **SMALL)
    assert 1 < begun.count < batches
    kept = path.read_text()
    assert whole.read_text().startswith(kept) and kept.count("\n") > 3 and bad not in kept
    extract(model, tokenizer, trait, judge=Remote(remote=remote), rollouts=path, **SMALL)
    assert path.read_bytes() == whole.read_bytes()


def test_an_interruption_waits_for_no_judge_and_keeps_what_is_ready():
    kept: list[int] = []
    stuck, ready = threading.Event(), [threading.Event() for _ in range(4)]

    def work(i: int) -> None:
        if i == 2:
            stuck.wait(WAIT)
        ready[i].set()

    def batches():
        yield from range(4)
        for i in (0, 1, 3):
            assert ready[i].wait(WAIT)
        time.sleep(0.05)  # the events come just before the results
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        score_batches(batches(), work, lambda i, _: kept.append(i), remote=True)
    stuck.set()
    assert kept == [0, 1] and time.monotonic() - start < WAIT / 2


def test_nothing_is_kept_after_a_batch_that_could_not_be():
    tried: list[int] = []

    def keep(i: int, _: int) -> None:
        tried.append(i)
        if i == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        score_batches(iter(range(6)), abs, keep, remote=True)
    assert tried == [0, 1]


def test_evaluation_and_sweeps_find_the_same_beside_generation(model, tokenizer, trait, begun):
    options = {"max_new_tokens": 3, "batch_tokens": 80, "temperature": 0.0}
    vector = random_direction(model)
    found = []
    for remote in (False, True):
        judge = Remote(remote=remote)
        grid = {"layer": [1], "coefs": [2.0], "controls": 0, **options}
        with steer(model, vector, layer=1, coef=1.0):
            evaluation = evaluate(model, tokenizer, trait, judge=judge, **options)
        found.append((evaluation, sweep(model, tokenizer, trait, vector, judge=judge, **grid)))
    assert repr(found[0]) == repr(found[1])
    assert begun.count > 6
