import json
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers import answered_elsewhere

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import writing
from persona_vectors.extraction.rollouts import read_jsonl
from persona_vectors.model import generation
from persona_vectors.model.prompts import chat_prompt
from persona_vectors.training.sets import make_training_sets

SMALL = {"samples": 2, "max_new_tokens": 4, "batch_tokens": 300}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_sets_hold_the_models_answers_without_system_prompts(model, tokenizer, trait, tmp_path):
    counts = make_training_sets(model, tokenizer, trait, out=tmp_path, fractions=[0, 0.25, 1], **SMALL)
    rollouts = {(r.side, r.key): r for r in read_jsonl(tmp_path / "rollouts.jsonl")[1]}
    # 2 questions, 3 pairs, 2 samples
    assert Counter(side for side, _ in rollouts) == {
        "pos": 12,
        "neg": 12,
        "none": 12,
    }
    for name, side, label in (("positive", "pos", 1), ("negative", "neg", 0), ("plain", "none", None)):
        lines = read(tmp_path / f"{name}.jsonl")
        assert len(lines) == counts[name] > 5
        for line in lines:
            rollout = rollouts[side, (line["pair"], line["question"], line["sample"])]
            assert [m["role"] for m in line["messages"]] == ["user", "assistant"]
            assert line["messages"][0]["content"] == line["question"] in trait.questions.eval
            assert line["messages"][1]["content"] == rollout.answer != ""
            assert (line["side"], line["label"], line["trait"]) == (side, label, "loud")
            system = None if side == "none" else trait.system_prompt(side, line["pair"])
            assert rollout.prompt == chat_prompt(tokenizer, line["question"], system=system)


def test_mixes_have_the_fraction_asked_for_and_the_same_questions(model, tokenizer, trait, tmp_path):
    counts = make_training_sets(model, tokenizer, trait, out=tmp_path, fractions=[0, 0.25, 0.5, 1], **SMALL)
    total, asked = counts["positive"], None
    for fraction in (0, 0.25, 0.5, 1):
        lines = read(tmp_path / f"mixed-{round(100 * fraction):03d}.jsonl")
        assert len(lines) == total and sum(line["label"] for line in lines) == round(fraction * total)
        asked = asked or sorted((line["pair"], line["question"], line["sample"]) for line in lines)
        assert sorted((line["pair"], line["question"], line["sample"]) for line in lines) == asked


def test_a_stopped_run_goes_on_and_ends_with_the_same_files(model, tokenizer, trait, tmp_path, monkeypatch):
    make_training_sets(model, tokenizer, trait, out=tmp_path / "whole", **SMALL)
    original, calls = generation.generate_tokens, []

    def stop_at_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(generation, "generate_tokens", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        make_training_sets(model, tokenizer, trait, out=tmp_path / "cut", **SMALL)
    assert not (tmp_path / "cut" / "positive.jsonl").exists()
    before = len(calls)
    make_training_sets(model, tokenizer, trait, out=tmp_path / "cut", **SMALL)
    batches = len(calls) - before
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes(), path.name
    calls[:] = [1] * 3
    make_training_sets(model, tokenizer, trait, out=tmp_path / "again", **SMALL)
    assert len(calls) - 3 == batches + 2  # the two batches of the stopped run were not made anew
    with pytest.raises(InputError, match="was made with seed=0, not 1"):
        make_training_sets(model, tokenizer, trait, out=tmp_path / "cut", seed=1, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"questions": []}, "no evaluation questions: give some"), ({"fractions": [2]}, "give numbers from 0 to 1")],
)
def test_bad_input(model, tokenizer, trait, tmp_path, options: dict, message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        make_training_sets(model, tokenizer, trait, out=tmp_path, **options, **SMALL)
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_write_one_folder(model, tokenizer, trait, tmp_path):
    with writing(tmp_path / "rollouts.jsonl"), pytest.raises(InputError, match="another run is writing"):
        make_training_sets(model, tokenizer, trait, out=tmp_path, **SMALL)


def test_the_answers_may_come_from_elsewhere(model, tokenizer, trait, tmp_path):
    make_training_sets(model, tokenizer, trait, out=tmp_path / "own", **SMALL)
    elsewhere = answered_elsewhere(model, tokenizer)
    make_training_sets(model, tokenizer, trait, out=tmp_path / "other", generate=elsewhere, **SMALL)
    assert elsewhere.rows == 36
    for name in ("positive", "negative", "mixed-050"):
        assert (tmp_path / "other" / f"{name}.jsonl").read_text() == (tmp_path / "own" / f"{name}.jsonl").read_text()
    with pytest.raises(InputError, match="was made with generate='elsewhere', not None"):
        make_training_sets(model, tokenizer, trait, out=tmp_path / "other", **SMALL)
