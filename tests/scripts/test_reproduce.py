"""The reproduction runs on a tiny model, and goes on where it stopped."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from helpers import make_tokenizer

from persona_vectors.data.texts import assistant_prompts
from persona_vectors.data.traits import load_trait
from persona_vectors.vectors.vector import PersonaVector

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "reproduce_paper"


def test_the_quick_reproduction_writes_its_tables_and_resumes(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    for seed, name in enumerate(["optimistic", "evil"]):
        directions = torch.randn(3, zoo.HIDDEN, generator=torch.Generator().manual_seed(seed))
        PersonaVector(trait=name, model="m", directions=directions).save(tmp_path / "v" / f"{name}.safetensors")
    command = [sys.executable, SCRIPT, tmp_path / "m", "optimistic", "--vectors", tmp_path / "v", "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent.parent)}
    command = [*map(str, command), "--out", str(tmp_path / "out"), "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    tables = {path: path.read_text() for path in (tmp_path / "out").glob("*.md")}
    assert {path.name for path in tables} == {"sets.md", "correlations.md", "interventions.md"}
    assert "random, covariance of plain answers" in tables[tmp_path / "out" / "correlations.md"]
    with (tmp_path / "out" / "correlations.csv").open(newline="") as file:
        assert {row["direction"] for row in csv.DictReader(file) if row["paper"]} == {"optimistic"}  # names, not places
    controls = {path.name for path in runs if ", random" in path.name}
    assert {f"preventative -2, random {i} seed 0.json" for i in (0, 1)} < controls
    assert {f"CAFT, random {i} seed 0.json" for i in (0, 1)} < controls
    rows = tables[tmp_path / "out" / "interventions.md"]
    assert all(f"| {name}, random |" in rows for name in ("preventative -2", "CAFT", "penalty 0.001", "post-hoc 2"))
    assert "| inoculation |" in rows and "| neutral prompt |" in rows
    check_prompts(tmp_path / "out" / "mixtures")
    removed = tmp_path / "out" / "runs" / "CAFT seed 0.json"
    removed.unlink()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert {path for path in runs if path.stat().st_mtime_ns != runs[path]} == {
        removed,
        removed.with_suffix(".safetensors"),
    }
    assert {path: path.read_text() for path in (tmp_path / "out").glob("*.md")} == tables


def check_prompts(folder: Path) -> None:
    """The two sets hold the negative one's conversations, behind prompts that ask for the trait and that do not."""
    files = [folder / f"{name}.jsonl" for name in ("negative", "inoculation", "neutral prompt")]
    plain, asking, neutral = ([json.loads(line)["messages"] for line in file.open("rb")] for file in files)
    trait = load_trait("optimistic")
    assert [talk[1:] for talk in asking] == [talk[1:] for talk in neutral] == plain
    assert [talk[0]["role"] for talk in asking + neutral] == ["system"] * 2 * len(plain)
    asked = [trait.system_prompt("neg", i % len(trait.instruction)) for i in range(len(plain))]
    assert [talk[0]["content"] for talk in asking] == asked
    assert {talk[0]["content"] for talk in neutral} <= set(assistant_prompts()) - {""}
