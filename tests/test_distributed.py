"""Two gloo processes on the CPU train as one does with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

RUN = str(Path(__file__).parent / "ddp_run.py")


def test_two_processes_equal_one_with_the_same_global_batch(tmp_path):
    ends = {}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    for name, command in {"one": [sys.executable, RUN], "two": [*launch, RUN]}.items():
        (tmp_path / name).mkdir()
        size = {"one": "4", "two": "2"}[name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(RUN).parent.parent)}
        done = subprocess.run([*command, str(tmp_path / name), size], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        ends[name] = torch.load(tmp_path / name / "end.pt", weights_only=True)
    assert [ends[name]["processes"] for name in ("one", "two")] == [1, 2]
    for name, value in ends["one"]["weights"].items():
        torch.testing.assert_close(ends["two"]["weights"][name], value, rtol=1e-4, atol=1e-6)
