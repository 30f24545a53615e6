"""The commands around fine-tuning, on a tiny model."""

import json
from pathlib import Path

import pytest
import zoo
from helpers import random_direction, run, save_tiny

from persona_vectors.training.shifts import Shift


@pytest.fixture
def tiny(tmp_path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def config(tiny, tmp_path) -> Path:
    random_direction(zoo.build("llama")).save(tmp_path / "v.safetensors")
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "data.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    settings = {
        "model": str(tiny),
        "training_file": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "tuned"),
        "max_steps": 2,
        "save_steps": 1,
        "learning_rate": 0.01,
        "steering_config": {"steering_vector_path": str(tmp_path / "v.safetensors"), "layer": 1, "steering_coef": -2},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path / "config.json"


def test_finetune_and_shift(tiny, config, tmp_path):
    out, told = run("finetune", config)
    assert "warning" not in told
    assert out.splitlines()[-1] == f"saved: {tmp_path / 'tuned'}"
    (tmp_path / "questions.txt").write_text("How?\n\nWhy?\n")
    arguments = [tiny, tmp_path / "v.safetensors", "--tuned", tmp_path / "tuned"]
    arguments += ["--questions", tmp_path / "questions.txt"]
    out, _ = run(
        "shift", *arguments, "--layer", 1, "--max-new-tokens", 2, "--device", "cpu", "--out", tmp_path / "s.json"
    )
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        ["t", "1", "prompt_last"],
        ["t", "1", "response_mean"],
    ]
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["questions"] == ["How?", "Why?"]
    assert Shift.load(tmp_path / "s.json").rows()[0]["shift"] != 0
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    out, _ = run("shift", *arguments, "--max-new-tokens", 0, "--device", "cpu")
    assert len(out.splitlines()) == 1 + 3  # every layer
    out, _ = run("shift", *arguments, "--max-new-tokens", 0, "--device", "cpu", "--controls", 20)
    assert out.splitlines()[0].endswith("shift [95 %]       deviations  beats isotropic  covariance")
    assert "each at its best layer, as 20 random directions at theirs:" in out
    assert "with the covariance of answers on plain facts" in out.splitlines()[-1]
    arguments[arguments.index("--tuned") + 1] = tiny
    out, _ = run("shift", *arguments, "--max-new-tokens", 0, "--device", "cpu", "--controls", 20)
    assert out.splitlines()[1].split()[-3:] == ["+nan", "nan%", "nan%"]  # nothing has moved


def test_a_finished_training_resumes_to_nothing_more(config, tmp_path):
    run("finetune", config)
    weights = (tmp_path / "tuned" / "adapter_model.safetensors").read_bytes()
    run("finetune", config, "--resume")
    assert (tmp_path / "tuned" / "adapter_model.safetensors").read_bytes() == weights
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "tuned").rglob("*"))
    assert "tuned is not empty: resume (--resume) what is there, or overwrite" in run("finetune", config, code=2)[1]
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "tuned").rglob("*")) == before
    run("finetune", config, "--overwrite")


def test_bad_input_says_what_to_do(tiny, config, tmp_path):
    (tmp_path / "no.json").write_text("[")
    assert "is not JSON" in run("finetune", tmp_path / "no.json", code=2)[1]
    (tmp_path / "no.json").write_text(json.dumps({**json.loads(config.read_text()), "epochs": "many"}))
    assert "field epochs" in run("finetune", tmp_path / "no.json", code=2)[1]
    vector = tmp_path / "v.safetensors"
    (tmp_path / "empty.txt").write_text("\n")
    assert (
        "holds no question"
        in run("shift", tiny, vector, "--tuned", tiny, "--questions", tmp_path / "empty.txt", code=2)[1]
    )
    _, err = run("shift", tiny, vector, "--tuned", tiny, "--layer", "top", "--questions", "optimistic", code=2)
    assert "--layer is 'top': give 13" in err
