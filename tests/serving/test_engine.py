"""Rows that share steps: each answer is the one that its edits give alone."""

import queue
import random
import threading
import time
from contextlib import ExitStack

import pytest
import torch
import zoo
from helpers import hooks, make_tokenizer, two_vectors

from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.sampling import row_seed
from persona_vectors.monitoring.trace import monitor
from persona_vectors.serving.changes import Change
from persona_vectors.serving.engine import Engine, Full
from persona_vectors.serving.rows import End, Job, Row
from persona_vectors.steering.add import steer
from persona_vectors.steering.bounds import ablate, cap, floor


def collect(engine: Engine, jobs: list[Job]) -> list[tuple[list, End]]:
    """Submit jobs and wait for them; return each one's tokens and end."""
    boxes = []
    for job in jobs:
        job.put = (box := queue.Queue()).put
        boxes.append(box)
    engine.submit(jobs)
    return [wait(box) for box in boxes]


def wait(box: queue.Queue) -> tuple[list, End]:
    events = []
    while not events or not isinstance(events[-1], End):
        events.append(box.get(timeout=60))
    return events[:-1], events[-1]


def some_job(number: int, vectors) -> Job:
    chance = random.Random(number)
    prompt = [chance.randrange(6, 60) for _ in range(chance.randrange(1, 14))]
    changes = [
        Change(
            chance.choice(["steer", "steer", "cap", "floor", "ablate"]),
            chance.choice(vectors),
            chance.randrange(3),
            chance.uniform(-3, 3),
            chance.choice(["all", "prompt", "response"]),
        )
        for _ in range(chance.randrange(4))
    ]
    keys = {"t@1": (1, 0), "r@2": (2, 1)} if number % 3 else {}
    return Job(
        prompt,
        print,
        chance.randrange(1, 9),
        temperature=0.9 * (number % 2),
        seed=row_seed(number, 0),
        changes=changes,
        keys=keys,
        top=3 if number % 4 == 0 else None,
    )


def alone(model, tokenizer, vectors, job: Job):
    """The same by the public verbs: the tokens, the projections of those that were read, and the prompt's."""
    verbs = {"cap": cap, "floor": floor}
    with ExitStack() as stack:
        for c in job.changes:
            where = {"layer": c.layer, "positions": c.positions}
            if c.kind == "steer":
                stack.enter_context(steer(model, c.vector, coef=c.amount, **where))
            elif c.kind == "ablate":
                stack.enter_context(ablate(model, c.vector, **where))
            else:
                stack.enter_context(verbs[c.kind](model, c.vector, limit=c.amount, **where))
        trace = stack.enter_context(monitor(model, vectors, layer=[1, 2], stops=[]))
        [(answer, _)] = generate_tokens(
            model,
            tokenizer,
            [job.prompt],
            max_new_tokens=job.max_new_tokens,
            temperature=job.temperature,
            seed=[job.seed],
            reading=True,
        )
    return answer, trace.last


@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "gpt2"))]
)
def test_each_answer_is_the_one_that_its_edits_give_alone(architecture):
    model, tokenizer = zoo.build(architecture), make_tokenizer()
    vectors = two_vectors(model)
    names = dict(zip(["t@1", "r@2"], [f"{vectors[0].trait}@1", f"{vectors[1].trait}@2"]))
    jobs = [some_job(number, vectors) for number in range(16)]
    expected = [alone(model, tokenizer, vectors, job) for job in jobs]
    engine = Engine(model, tokenizer, vectors, rows=5)
    found: dict[int, tuple] = {}

    def client(first: int) -> None:
        for number in range(first, 16, 4):
            [found[number]] = collect(engine, [jobs[number]])

    threads = [threading.Thread(target=client, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    assert engine.figures["steps"] < engine.figures["tokens"] / 1.5 and hooks(model) == 0
    for number, (job, (answer, readings)) in enumerate(zip(jobs, expected)):
        tokens, end = found[number]
        assert [token.id for token in tokens] == answer, number
        assert end.reason == ("length" if len(answer) == job.max_new_tokens else "stop")
        for key in job.keys:
            values = readings[names[key]][0]
            begin = len(job.prompt)
            got = torch.tensor([token.values[key] for token in tokens])
            torch.testing.assert_close(got, values[begin : begin + len(answer)], rtol=1e-4, atol=1e-4)
            assert end.before[key] == pytest.approx(float(values[begin - 1]), rel=1e-4, abs=1e-4)
            if answer:
                assert end.means[key] == pytest.approx(float(got.mean()), rel=1e-4, abs=1e-4)


def test_logprobs_are_the_model_s_own(model, tokenizer):
    engine = Engine(model, tokenizer, [])
    [(tokens, _)] = collect(engine, [Job([7, 8, 9], print, 3, top=4)])
    engine.close()
    with torch.no_grad():
        logs = model(torch.tensor([[7, 8, 9, *(token.id for token in tokens)]])).logits[0, 2:-1].log_softmax(dim=-1)
    for token, row in zip(tokens, logs):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-5)
        assert [i for i, _ in token.top] == row.topk(4).indices.tolist()


def test_stop_strings_cut_the_text_wherever_tokens_begin(model, tokenizer):
    letters = tokenizer("abcdefgh", add_special_tokens=False).input_ids
    bias = torch.full((len(model.lm_head.weight),), -99.0)
    bias[letters] = 0.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    engine = Engine(model, tokenizer, two_vectors(model))
    for keys in ({}, {"t": (1, 0)}):
        for seed in range(2):
            options = {"temperature": 1.0, "seed": seed, "keys": keys}
            [(tokens, _)] = collect(engine, [Job([7, 8], print, 30, **options)])
            text = "".join(token.text for token in tokens)
            assert len(text) == 30
            stops = [text[12:15], text[20:22], "zzz"]
            [(tokens, end)] = collect(engine, [Job([7, 8], print, 30, stop=stops, **options)])
            expected = min(text.index(stop) for stop in stops[:2])
            assert "".join(token.text for token in tokens) == text[:expected] and end.reason == "stop"
    engine.close()


def test_an_alarm_ends_the_answer_at_the_token_that_passes_it(model, tokenizer):
    engine = Engine(model, tokenizer, two_vectors(model))
    job = Job([7, 8], print, 20, keys={"t": (1, 0)})
    [(tokens, end)] = collect(engine, [job])
    values = [token.values["t"] for token in tokens]
    limit = sorted(values)[-3]
    [(cut, end)] = collect(engine, [Job([7, 8], print, 20, keys={"t": (1, 0)}, alarm={"t": limit})])
    engine.close()
    first = next(i for i, value in enumerate(values) if value > limit)
    assert (end.reason, end.alarm, len(cut)) == ("alarm", "t", first + 1)


def test_a_full_queue_refuses_and_a_cancelled_row_is_freed(model, tokenizer):
    engine = Engine(model, tokenizer, [], rows=1, waiting=1)
    boxes = [queue.Queue() for _ in range(2)]
    jobs = [Job([7, 8], box.put, 5000) for box in boxes]
    engine.submit(jobs[:1])
    boxes[0].get(timeout=60)
    engine.submit(jobs[1:])
    with pytest.raises(Full):
        engine.submit([Job([7], print, 1)])
    for job in jobs:
        job.cancelled = True
    begin = time.monotonic()
    while engine.load != (0, 0):
        assert time.monotonic() - begin < 20
        time.sleep(0.01)
    [(_, end)] = collect(engine, [Job([7, 8], print, 5000, deadline=time.monotonic() + 0.05)])
    assert end.reason == "error" and "time limit" in end.error
    engine.close()
    assert not engine.alive and hooks(model) == 0
    with pytest.raises(Full):
        engine.submit([Job([7], print, 1)])


def test_a_failing_pass_ends_its_rows_and_no_others(model, tokenizer, monkeypatch):
    vectors = two_vectors(model)
    engine = Engine(model, tokenizer, vectors)
    own, calls = model.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return own(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    changes = [Change("steer", vectors[0], 1, 2.0)]
    [(_, end)] = collect(engine, [Job([7, 8], print, 5, changes=changes, keys={"t": (1, 0)})])
    assert end.reason == "error" and "MemoryError" in end.error
    [(_, end)] = collect(engine, [Job([7, 8], print, 5)])
    assert end.reason in ("length", "stop")
    engine.close()
    assert hooks(model) == 0


def test_reasoning_is_told_apart_from_the_answer(tokenizer):
    """A row that is made to write a thought and an answer: the mean is the answer's."""
    text, events = "<think>ab</think>cde", []
    ids = tokenizer(text, add_special_tokens=False).input_ids
    row = Row(Job([7, 8], events.append, len(ids), keys={"t": (1, 0)}), tokenizer, stops=[2])
    row.read({1: [[-5.0]]}, 0)
    for place, token in enumerate(ids):
        row.choose(torch.zeros(300), token)
        row.read({1: [[float(place)]]}, 0)
    end = events[-1]
    outside = list(range(len("<think>ab</think>"), len(text)))
    assert list(end.thoughts) == [place for place in range(len(ids)) if place not in outside]
    assert end.means == {"t": pytest.approx(sum(outside) / 3)} and end.before == {"t": -5.0} and end.reason == "length"
    assert [token.values["t"] for token in events[:-1]] == list(map(float, range(len(ids))))
