"""The benchmark of a slow judge: that each way does what it says, and that the judge is one."""

import time

import pytest
from bench import judging

from persona_vectors.evaluation.judge import Answer
from persona_vectors.evaluation.judges import score_both
from persona_vectors.evaluation.openai_judge import OpenAIJudge

OPTIONS = {"samples": 2, "first": 2, "max_new_tokens": 5, "min_pairs": 1}


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with judging.slow_server(0.2) as address:
        yield address


def test_the_judge_takes_its_time_and_many_at_once(address, model, tokenizer, tmp_path):
    judge = OpenAIJudge("slow", base_url=address, cache=tmp_path / "judge.jsonl")
    begun = time.monotonic()
    answers = [Answer("q", f"answer {i}") for i in range(20)]
    scores, coherence = zip(*score_both(model, tokenizer, judge, answers, "score {question} {answer}"))
    assert 0.2 <= time.monotonic() - begun < 20 * 0.2
    assert set(scores) == {0.0, 100.0} and set(coherence) == {100.0} and judge.usage.requests == 40


def test_every_way_is_run_in_turn_and_compared_with_the_longer(address, model, tokenizer, trait, capsys):
    ways, order = judging.ways_of(model, tokenizer, trait, address, OPTIONS), []
    noted = {name: lambda number, n=name, w=way: (order.append(n), w(number))[1] for name, way in ways.items()}
    times = judging.run_ways(noted, 2)
    assert order == ["generating", "judging", "both", "both", "judging", "generating"]
    assert all(len(each) == 2 and min(each) > 0 for each in times.values()) and min(times["judging"]) >= 0.2
    table = judging.report({"generating": [2.0, 4.0], "judging": [3.0, 1.0], "both": [6.0, 4.0]}, answers=16)
    assert [line["x the longer"] for line in table] == pytest.approx([(2 / 3 + 1) / 2, (1 + 0.25) / 2, 1.5])
    assert "both" in capsys.readouterr().out
