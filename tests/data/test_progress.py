import re

from helpers import hooks
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import persona_vectors as pv
from persona_vectors.data.progress import bar, pulse
from persona_vectors.model.generation import generate


def shown(capsys) -> str:
    with bar(total=3, desc="answers", unit="answer") as done:
        done.delay = 0
        for _ in range(3):
            done.update()
        done.refresh()
    return capsys.readouterr().err


def test_a_long_step_says_how_far_it_is_and_the_innermost_open_bar_says_it(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with bar(total=1, desc="outer", unit="batch") as outer:
        pulse("too early")
        outer.start_t -= 5
        with bar(total=3, desc="inner", unit="answer") as inner:
            inner.start_t -= 5
            inner.last_print_t -= 5
            pulse("token 1 of 9")
            pulse("at once again")
        outer.last_print_t -= 5
        pulse("goes on")
    told = capsys.readouterr().err
    assert re.search(r"inner.*token 1 of 9", told) and re.search(r"outer.*goes on", told)
    assert "too early" not in told and "at once again" not in told
    pulse("no bar is open")
    assert capsys.readouterr().err == ""


def test_one_batch_of_slow_answers_is_not_silent(model, tokenizer, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    clock = [1e9]

    def later() -> float:
        clock[0] += 1  # each look at the clock is a second after the last
        return clock[0]

    monkeypatch.setattr("persona_vectors.data.progress.time.time", later)
    monkeypatch.setattr("tqdm.std.time", later)
    generate(model, tokenizer, ["Hi", "Why?"], max_new_tokens=9)
    told = re.findall(r"answers: +0%.*?token (\d) of at most 9", capsys.readouterr().err)
    assert len(told) > 3  # while no answer is done


def test_many_long_prompts_are_told_block_by_block_while_they_are_read(model, tokenizer, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    clock, plain = [1e9], LlamaDecoderLayer.forward

    def slow(*arguments, **options):
        clock[0] += 4
        return plain(*arguments, **options)

    monkeypatch.setattr("persona_vectors.data.progress.time.time", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    monkeypatch.setattr(LlamaDecoderLayer, "forward", slow)
    long = [f"{i // 2} {'Why?' * 20}" for i in range(20)]  # pairs that are read once
    found = generate(model, tokenizer, long, max_new_tokens=2)
    told = capsys.readouterr().err
    assert found == generate(model, tokenizer, long, max_new_tokens=2, batch_tokens=200)
    capsys.readouterr()
    assert re.findall(r"block (\d) of 3", told) == ["1", "2", "3"]  # and not again, at each token
    assert hooks(model) == 0
    generate(model, tokenizer, ["Hi"], max_new_tokens=2)
    assert "block" not in capsys.readouterr().err


def test_one_switch_silences_every_bar(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert "answers: 100%" in shown(capsys)
    pv.show_progress(False)
    try:
        assert shown(capsys) == ""
    finally:
        pv.show_progress()
    assert "answers: 100%" in shown(capsys)


def test_the_time_left_is_of_the_mean_rate_though_a_batch_s_answers_end_at_once(capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    clock = [1e9]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with bar(total=80, desc="answers", unit="answer") as done:
        clock[0] += 100
        for _ in range(40):
            clock[0] += 0.001
            done.update()
        done.refresh()
    assert "[01:40<01:40," in capsys.readouterr().err
