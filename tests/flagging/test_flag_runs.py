"""Whole runs of `persona-vectors flag`: killed at random moments, shared out to Ray actors, on a full disk."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers import ENVIRONMENT, command, random_direction, run, run_with_file_limit, save_tiny

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.flagging import job as flagging
from persona_vectors.model import actors, loading

pytestmark = pytest.mark.slow

SAMPLES = [{"question": f"{i % 37}?", "answer": f"{'so ' * (i % 5)}it is {i}"} for i in range(120)]


@pytest.fixture
def made(tmp_path, model) -> Path:
    """A folder with a model, a vector and a dataset."""
    save_tiny(tmp_path / "tiny")
    random_direction(model).save(tmp_path / "v.safetensors")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES))
    return tmp_path


def flags(folder: Path, out: str, baseline: str = "prompt_last") -> list[object]:
    options = ["--layer", 1, "--data", folder / "d.jsonl", "--baseline", baseline, "--max-new-tokens", 8]
    options += ["--cache", folder / f"{out}.sqlite", "--batch-tokens", 64, "--out", folder / out, "--device", "cpu"]
    return ["flag", folder / "tiny", folder / "v.safetensors", *options]


def test_the_command_line_flags_splits_and_compares(made, trait):
    trait.save(made / "loud.json")
    more = ["--html", made / "f.html", "--percentile", "80", "--judge", "contrast:1", "--trait", made / "loud.json"]
    printed, _ = run(*flags(made, "f.parquet", "generate"), *more)
    assert "120 samples" in printed and "at or above" in printed and "report ->" in printed
    assert "judge" in pq.read_schema(made / "f.parquet").names and (made / "f.html").stat().st_size > 10_000
    run(*flags(made, "f.parquet", "generate"), *more[:4], "--each", 2)
    (shown,) = re.findall(r'id="rows">(.*?)</script>', (made / "f.html").read_text("utf-8"))
    assert 4 <= len(json.loads(shown)) <= 6  # top, bottom and random ones, some of them twice
    printed, _ = run("split", made / "d.jsonl", "--flags", made / "f.parquet", "--kept", made / "kept.jsonl")
    assert printed == "96 kept, 24 removed, 0 left out\n"
    assert "no telling" in run("compare", made / "f.parquet", made / "f.parquet")[0]
    _, error = run(*flags(made, "g.parquet"), "--judge", "sentiment", code=2)
    assert "--judge and --trait belong together" in error
    _, error = run(*flags(made, "g.parquet"), "--each", 2, code=2)
    assert "give --html a file too" in error
    _, error = run(*flags(made, "f.parquet"), code=2)
    assert "was made with baseline='generate', not 'prompt_last'" in error


KILLED = """
import os, random, sys, threading, time
import persona_vectors as pv
folder, seed, longest = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
model, tokenizer = pv.load_model(folder + "/tiny", device="cpu")
vector = pv.PersonaVector.load(folder + "/v.safetensors")
options = {"layer": 1, "max_new_tokens": 8, "cache": folder + "/killed.sqlite", "batch_tokens": 64, "chunk": 8}
if seed >= 0:
    def kill():
        time.sleep(random.Random(seed).uniform(0, longest))
        os.kill(os.getpid(), 9)
    threading.Thread(target=kill, daemon=True).start()
pv.flag(model, tokenizer, folder + "/d.jsonl", vector, out=folder + "/killed.parquet", **options)
"""


def test_a_run_that_is_killed_ten_times_ends_with_the_same_file(made, model, tokenizer):
    vector = random_direction(model)
    options = {"layer": 1, "max_new_tokens": 8, "cache": made / "c.sqlite", "batch_tokens": 64, "chunk": 8}
    tiny, tokens = pv.load_model(made / "tiny", device="cpu")
    begin = time.perf_counter()
    pv.flag(tiny, tokens, made / "d.jsonl", vector, out=made / "whole.parquet", **options)
    longest = str(0.2 * (time.perf_counter() - begin))  # so that a few kills hit, on a fast machine and on a slow one
    killed = 0
    for seed in [*range(10), -1]:
        arguments = [sys.executable, "-c", KILLED, made, str(seed), longest]
        done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        killed += done.returncode == -signal.SIGKILL
    assert killed >= 3 and done.returncode == 0
    whole, again = (pq.read_table(made / f"{name}.parquet") for name in ("whole", "killed"))
    assert again.equals(whole) and len(whole) == len(SAMPLES)
    assert again.schema.metadata == whole.schema.metadata
    assert not list(made.glob("*.parts")) and not list(made.glob(".*"))


def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on(made):
    arguments = flags(made, "f.parquet")
    done = run_with_file_limit(command(*arguments), 1000)
    assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1], done.stderr
    assert not (made / "f.parquet").exists()
    run(*arguments)
    run(*flags(made, "g.parquet"))
    assert pq.read_table(made / "f.parquet").equals(pq.read_table(made / "g.parquet"))


@pytest.mark.parametrize("baseline", ["generate", "prompt_last"])
def test_ray_actors_give_the_same_numbers_and_one_that_is_killed_costs_nothing(made, baseline, model, monkeypatch):
    ray = pytest.importorskip("ray")
    options = {"layer": 1, "max_new_tokens": 8, "batch_tokens": 64, "chunk": 8, "baseline": baseline}
    tiny, tokens = pv.load_model(made / "tiny", device="cpu")
    vector, marker = random_direction(model), made / "killed"
    tiny(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)  # it keeps hooks that refer to a ContextVar
    pv.flag(tiny, tokens, made / "d.jsonl", vector, out=made / "a.parquet", cache=made / "a.sqlite", **options)

    def dies_once(folder, tokenizer, units, model, number, **options):
        if number == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        from persona_vectors.flagging.work import project_rows  # in the actor, where it is not replaced

        project_rows(folder, tokenizer, units, model, number, **options)

    monkeypatch.setattr(flagging, "project_rows", dies_once)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    try:
        options |= {"cache": made / "b.sqlite", "workers": 2}
        pv.flag(tiny, tokens, made / "d.jsonl", vector, out=made / "b.parquet", **options)
        # and with actors that load the model themselves: this process holds no weights
        monkeypatch.setattr(loading, "_load", lambda *_: pytest.fail("the model was loaded here"))
        options |= {"cache": made / "c.sqlite"}
        pv.flag(made / "tiny", tokens, made / "d.jsonl", vector, out=made / "c.parquet", **options)
    finally:
        ray.shutdown()
    assert marker.exists()
    assert pq.read_table(made / "b.parquet").equals(pq.read_table(made / "a.parquet"))
    assert (made / "c.parquet").read_bytes() == (made / "a.parquet").read_bytes()


def test_large_models_do_not_go_through_the_object_store(made, monkeypatch, model, tokenizer):
    pytest.importorskip("ray")
    monkeypatch.setattr(actors, "_ray", lambda: None)
    monkeypatch.setattr(actors, "STORE_LIMIT", 1000)
    options = {"layer": 1, "baseline": "none", "controls": 0, "workers": 2}
    with pytest.raises(InputError, match=r"workers are given one in memory up to .* give its Hub id or folder"):
        pv.flag(model, tokenizer, SAMPLES[:3], random_direction(model), out=made / "f.parquet", **options)
