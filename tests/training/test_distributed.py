"""Two gloo processes on the CPU train as one does with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from helpers import random_direction, rows
from torch.utils.data import default_collate

from persona_vectors.steering.add import steer

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]


def run(command: list[str], script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run a script that writes `folder`/end.pt, and return what it wrote."""
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [*command, str(HERE / script), str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "end.pt", weights_only=True)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    one = run([sys.executable], "ddp_run.py", tmp_path / "one", "4")
    two = run(TWO, "ddp_run.py", tmp_path / "two", "2")
    assert [one["processes"], two["processes"]] == [1, 2]
    assert_same(two["weights"], one["weights"])


def test_sharded_blocks_are_steered_as_whole_ones(tmp_path):
    found = run(TWO, "fsdp_run.py", tmp_path / "two")
    assert found["sharded"]
    model = zoo.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with steer(model, random_direction(model), layer=1, coef=3.0, positions="labels"):
        for _ in range(4):
            model(**default_collate(rows(8))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert any(not torch.allclose(before[name], value, atol=1e-4) for name, value in model.state_dict().items())
    assert_same(found["weights"], model.state_dict())
