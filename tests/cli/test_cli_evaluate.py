"""The commands that measure, on a tiny model."""

import json
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import zoo
from helpers import ENVIRONMENT, command, random_direction, run, save_tiny

from persona_vectors.evaluation.likelihood import load_statements
from persona_vectors.evaluation.points import Sweep
from persona_vectors.vectors.vector import PersonaVector


@pytest.fixture
def tiny(tmp_path) -> Path:
    return save_tiny(tmp_path / "tiny")


@pytest.fixture
def trait_file(trait, tmp_path) -> Path:
    trait.save(tmp_path / "loud.json")
    return tmp_path / "loud.json"


@pytest.fixture
def vector(tmp_path) -> Path:
    made = replace(random_direction(zoo.build("llama")), trait="optimistic", residual_norms=torch.ones(3))
    made.save(tmp_path / "v.safetensors")
    return tmp_path / "v.safetensors"


def test_evaluate_prints_plain_and_edited(tiny, trait_file, vector):
    small = ["--max-new-tokens", 4, "--device", "cpu"]
    out, _ = run("evaluate", tiny, trait_file, "--vector", vector, "--layer", 1, "--coef", 2, *small)
    assert [line[:16].strip() for line in out.splitlines()[1:3]] == ["plain", "with the options"]
    assert "6 answers to 2 questions" in out
    out, _ = run("evaluate", tiny, trait_file, "--vector", vector, "--layer", "1,2", "--dose=-1,1", *small)
    assert [line[:16].strip() for line in out.splitlines()[1:4]] == ["plain", "dose -1", "dose +1"]
    out, _ = run("evaluate", tiny, trait_file, "--vector", vector, "--layer", 1, "--cap", -3, *small)
    assert "with the options" in out
    out, _ = run("evaluate", tiny, "optimistic", "--max-new-tokens", 2, "--judge", "sentiment", "--device", "cpu")
    assert "with the options" not in out and "60 answers to 20 questions" in out
    _, err = run("evaluate", tiny, trait_file, "--vector", vector, "--layer", 1, code=2)
    assert "one of --coef, --dose and --cap" in err
    with mock.patch("persona_vectors.model.generation.generate_tokens", side_effect=AssertionError("answered first")):
        steered = ["evaluate", tiny, trait_file, "--vector", vector, *small]
        assert "give finite numbers" in run(*steered, "--layer", 1, "--coef", "nan", code=2)[1]
        assert "layer 9 is out of range" in run(*steered, "--layer", 9, "--coef", 1, code=2)[1]
    _, err = run("evaluate", tiny, "optimistic", *small, "--judge", "sentiment", "--check-judge")
    assert "sentiment (VADER): AUROC 0." in err
    _, err = run("evaluate", tiny, "evil", *small, "--judge", "contrast", "--check-judge", code=2)
    assert "this judge cannot be trusted with 'evil'" in err
    _, err = run("evaluate", tiny, trait_file, "--judge", "none", code=2)
    assert "needs a judge" in err


def test_sweep_writes_a_table_and_plots(tiny, trait_file, vector, tmp_path):
    out, _ = run(
        *("sweep", tiny, trait_file, vector, "--layer", "0,2", "--coefs=-1,0,1", "--controls", 2, "--gate", 0),
        *("--max-new-tokens", 3, "--device", "cpu", "--out", tmp_path / "s"),
    )
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "sweep.json",
        "sweep.csv",
        "sweep.png",
        "answers.jsonl",
    }
    assert all(name in out for name in ("plain", "own system prompt", "random 0", "covariance 0", "wrong way"))
    _, err = run("sweep", tiny, trait_file, vector, "--layer", "0-x", "--coefs", "1", code=2)
    assert "--layer is '0-x': give 13, or 13,22, or 10-20" in err


@pytest.mark.slow
def test_a_killed_sweep_repeats_no_answer_and_ends_as_one_that_was_not(tiny, trait_file, vector, tmp_path):
    def options(name: str) -> list[str]:
        grid = ["--layer", "0,1,2", "--coefs=-2,-1,1,2", "--controls", 2, "--gate", 0, "--samples", 6]
        small = ["--batch-tokens", 100, "--max-new-tokens", 6, "--device", "cpu"]
        return command("sweep", tiny, trait_file, vector, *grid, *small, "--out", tmp_path / name)

    path = tmp_path / "killed" / "answers.jsonl"
    subprocess.run(options("whole"), env=ENVIRONMENT, check=True, capture_output=True)
    whole = (tmp_path / "whole" / "answers.jsonl").read_bytes().count(b"\n")
    for lines in (whole // 4, whole * 3 // 4):
        process = subprocess.Popen(options("killed"), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (path.parent / "sweep.csv").exists()
    subprocess.run(options("killed"), env=ENVIRONMENT, check=True, capture_output=True)
    entries = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    answered = [entry["key"] for entry in entries if "answer" in entry]
    assert len(answered) == len(set(answered)) > 100
    assert (path.parent / "sweep.csv").read_text() == (tmp_path / "whole" / "sweep.csv").read_text()


def test_contrast_prints_a_row_a_vector_and_the_matrix(tiny, vector, tmp_path):
    made = replace(-random_direction(zoo.build("llama")), trait="humorous", residual_norms=torch.ones(3))
    made.save(tmp_path / "w.safetensors")
    arguments = ("--layer", "1", "--doses", "0.1", "--controls", 4, "--max-perplexity", 9, "--device", "cpu")
    out, _ = run("contrast", tiny, vector, tmp_path / "w.safetensors", *arguments)
    lines = out.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["optimistic", "1", "0.1"], ["humorous", "1", "0.1"]]
    assert [line.split()[0] for line in lines[-2:]] == ["optimistic", "humorous"]
    diagonal = float(lines[-2].split()[1])
    assert float(lines[1].split()[3]) == pytest.approx(diagonal, abs=2e-3)
    assert len(load_statements("optimistic").pairs) == 24


def test_contrast_stores_what_it_found_and_a_bare_command_uses_it(tiny, vector, tmp_path):
    arguments = ("--layer", "1", "--doses", "0.1", "--controls", 4, "--max-perplexity", 9, "--device", "cpu")
    asked = ("--question", "Hi", "--max-new-tokens", 3, "--device", "cpu")
    assert "stores no layer to steer at: give a layer, or measure one" in run("steer", tiny, vector, *asked, code=2)[1]
    _, err = run("contrast", tiny, "smollm2-135m/optimistic", *arguments, "--store", code=2)
    assert "--store writes into the vector's file, and smollm2-135m/optimistic is none" in err
    _, err = run("contrast", tiny, vector, *arguments, "--store")
    use = PersonaVector.load(vector).uses["steer"]
    assert str(use) in err and use.source.startswith("persona-vectors contrast tiny v.safetensors --layer 1")
    assert (use.layer, use.model, str(tmp_path) in use.source) == (1, "tiny", False)
    loaded = PersonaVector.load(vector)
    loaded.with_use(replace(use, evidence=True)).save(vector)
    assert f"layer 1, coef {use.coef:+.3g} | Hi" in run("steer", tiny, vector, *asked)[0]
    assert "coef +1 | Hi" in run("steer", tiny, vector, *asked, "--coef", 1)[0]
    assert "give either --coef" in run("steer", tiny, vector, *asked, "--layer", 1, code=2)[1]
    printed, _ = run("info", vector)
    assert f"steer: layer 1, coef {use.coef:+.3g}" in printed
    (facts,) = json.loads(run("info", vector, "--json")[0])
    assert facts["uses"]["steer"]["layer"] == 1
    loaded.with_use(replace(use, evidence=True, positions="response")).save(vector)
    short = ("evaluate", tiny, "optimistic", "--vector", vector, "--judge", "sentiment", "--samples", 1, *asked[2:])
    assert "recommends positions='response': give them" in run(*short, code=2)[1]
    assert "with the options" in run(*short, "--positions", "response")[0]
    loaded.with_use(replace(use, evidence=False)).save(vector)
    assert "no recommendation to steer, at its best layer, 1" in run("steer", tiny, vector, *asked, code=2)[1]


def test_sweep_stores_what_it_chose(tiny, trait_file, vector, tmp_path):
    options = ("--layer", "0,2", "--coefs=-1,1", "--controls", 2, "--gate", 0, "--max-new-tokens", 3, "--store")
    run("sweep", tiny, trait_file, vector, *options, "--device", "cpu", "--out", tmp_path / "s")
    found = Sweep.load(tmp_path / "s" / "sweep.json")
    use = PersonaVector.load(vector).uses["steer"]
    assert (use.layer, use.coef, use.evidence) == (found.layer, found.coef, found.works)


def test_flag_stores_what_labels_say_and_monitor_uses_it(tiny, vector, tmp_path):
    rows = [{"question": f"{i}?", "answer": "ab" * (i + 1), "bad": i % 2} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--data", tmp_path / "d.jsonl", "--baseline", "none", "--controls", 20, "--device", "cpu")
    out = ("--out", tmp_path / "f.parquet", "--layer", "0,2")
    _, err = run("flag", tiny, vector, *options, *out, "--store", code=2)
    assert "--store keeps what --labels says" in err
    _, err = run("flag", tiny, vector, *options, "--out", tmp_path / "f.parquet", code=2)
    assert "stores no layer to flag at" in err
    run("flag", tiny, vector, *options, *out, "--labels", "bad", "--store")
    use = PersonaVector.load(vector).uses["monitor"]
    assert use.layer in (0, 2) and use.measure == "AUROC of the samples labelled 'bad' in d.jsonl"
    PersonaVector.load(vector).with_use(replace(use, evidence=True)).save(vector)
    asked = ("--question", "Hi", "--max-new-tokens", 3, "--device", "cpu", "--json")
    bare, told = (json.loads(run("monitor", tiny, vector, *asked, *w)[0]) for w in ((), ("--layer", use.layer)))
    assert bare == told


def test_contrast_scores_the_rows_of_an_eval(tiny, vector, tmp_path):
    rows = [
        {
            "question": f"Which?\n\nChoices:\n (A) a{i}\n (B) b{i}",
            "answer_matching_behavior": "(A)",
            "answer_not_matching_behavior": "(B)",
        }
        for i in range(11)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = ("--layer", "1", "--doses", "0.1", "--controls", 4, "--max-perplexity", 9, "--device", "cpu", "--json")
    given = ("--statements", tmp_path / "rows.json", "--first", 10)
    (row,) = json.loads(run("contrast", tiny, vector, *given, *arguments)[0])
    assert row["effect_low"] <= row["effect"] <= row["effect_high"] and 0 <= row["beaten"] <= 1
    _, err = run("contrast", tiny, vector, *given, *given, *arguments, code=2)
    assert "2 statements for 1 vectors: give --statements for each vector" in err


def test_answer_and_reasoning_are_positions_of_the_commands(tiny, trait_file, vector, tmp_path):
    """Here no answer holds reasoning: the answer is all of the response, and an edit of the rest does nothing."""
    small = ["--max-new-tokens", 4, "--device", "cpu", "--json", "--layer", 1]
    scored = ["--judge", "sentiment", "--samples", 1, *small]
    commands = {
        "steer": ["steer", tiny, vector, "--coef=0,6", "--temperature", 0, "--question", "Hi", *small],
        "evaluate": ["evaluate", tiny, "optimistic", "--vector", vector, "--coef", 6, *scored],
        "cap": ["evaluate", tiny, "optimistic", "--vector", vector, "--cap", -30, *scored],
    }
    for name, words in commands.items():
        found = {p: json.loads(run(*words, "--positions", p)[0]) for p in ("response", "answer", "reasoning")}
        plain, untouched = (
            {key: value for key, value in row.items() if key not in ("state", "coef")} for row in found["reasoning"]
        )
        assert plain == untouched and found["answer"] == found["response"] != found["reasoning"], name
    options = ["--coefs", 6, "--gate", 0, "--controls", 0, "--samples", 1, "--out", tmp_path / "s"]
    rows = json.loads(run("sweep", tiny, trait_file, vector, *small, *options, "--positions", "answer")[0])
    assert {row["positions"] for row in rows} == {"answer"}
    assert "give one of all, prompt, response" in run(*commands["steer"], "--positions", "thought", code=2)[1]
    statements = ["contrast", tiny, vector, "--statements", "optimistic", "--device", "cpu", "--positions", "answer"]
    assert "statements hold no reasoning; give all, prompt or response" in run(*statements, code=2)[1]
