"""The server's benchmarks, tiny: a process of its own, real requests."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bench import soak
from helpers import ENVIRONMENT, save_tiny, vectors_of_their_own

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(tmp_path, model):
    """What runs `scripts/bench serve` with a tiny model; it returns the file that was written, and what was printed."""
    config = save_tiny(tmp_path / "tiny") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 65_536}))
    served = ["--model", tmp_path / "tiny"]
    for vector in vectors_of_their_own(model):
        vector.save(path := tmp_path / f"{vector.trait}.safetensors")
        served += ["--vector", path]

    def run(*arguments: object) -> tuple[dict, str]:
        out = tmp_path / "out.json"
        command = [sys.executable, ROOT / "scripts/bench", "serve", *arguments, *served, "--out", out]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text()), done.stdout

    return run


@pytest.mark.slow
def test_isolation_finds_every_answer_as_it_is_alone(bench):
    found, printed = bench("isolation")  # 200 requests, 16 clients, 24 tokens
    assert found["equal"] == 200 and not found["differ"] and found["tokens a step"] > 2
    assert (
        "200 of 200 answers equal those alone" in printed and int(re.search(r"(\d+) different texts", printed)[1]) > 5
    )


@pytest.mark.slow
def test_throughput_tells_what_clients_at_once_gain_and_projections_cost(bench):
    found, printed = bench("throughput", "--clients", 3, "--new-tokens", 8, "--rounds", 2, "--pairs", 2)
    assert [(way, len(runs)) for way, runs in found["runs"].items()] == [
        ("one after another", 2),
        ("3 at once", 4),
        ("3 at once, projections", 4),
    ]
    assert all(tokens == 24 for runs in found["runs"].values() for _, _, tokens in runs)
    assert "times the tokens a second (wall) of one after another" in printed
    assert "% more time a token (CPU) of 3 at once" in printed


@pytest.mark.slow
def test_a_step_with_projections_is_beside_plain_ones(bench):
    found, printed = bench("step", "--steps", 6, "--rows", 3)
    assert [line["way"] for line in found["steps"]] == ["plain", "plain again", "projections"]
    assert found["steps"][0]["more %"] == 0 and found["steps"][2]["from"] <= found["steps"][2]["to"]
    assert "projections" in printed and "3 rows" in printed


@pytest.mark.slow
def test_a_soak_ends_with_nothing_left(bench):
    found, printed = bench("soak", "--minutes", 0.1, "--clients", 12, "--rows", 2, "--new-tokens", 16)
    assert found["rows left"] == found["hooks left"] == 0 and len(found["memory"]) > 5
    assert {"whole (length)", "stream, stream", "429"} <= set(found["replies"]) and "broken" not in found["replies"]
    assert "growth %" in printed


def test_a_soak_s_summary_is_of_the_time_after_the_warm_up():
    memory = [(float(i), value) for i, value in enumerate([10.0] * 4 + [100.0] * 4 + [104.0] * 8 + [110.0] * 4)]
    left = {f"persona_vectors_{name}": 0.0 for name in ("rows", "waiting", "hooks", "steps_total", "tokens_total")}
    found = soak.summary(memory, left | {"process_open_fds": 9.0, "persona_vectors_waiting": 2.0})
    assert (found["MB after warm-up"], found["MB at the end"], found["growth %"]) == (100, 110, 10)
    assert found["rows left"] == 2 and found["hooks left"] == 0
