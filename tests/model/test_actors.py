"""Ray actors that load the model themselves: the process that asks them holds no weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from persona_vectors.model.actors import Elsewhere, map_in_actors


def save(folder: Path, blocks: int) -> tuple[Path, float]:
    """Save a random model of so many blocks; return its folder, and its size in MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 262}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **sizes))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder, sum(weight.nbytes for weight in model.parameters()) / 2**20


def peak(folder: str) -> float:
    """Return the most MB that this process takes while an actor reads parts with the model in a folder."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    blocks = map_in_actors(Elsewhere(folder), lambda model, _: str(len(model.model.layers)), ["a", "b"], workers=1)
    assert len({*blocks}) == 1
    ray.shutdown()
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage's peak begins with the parent's
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_driver_s_memory_does_not_grow_with_the_model(tmp_path):
    pytest.importorskip("ray")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = []
    for blocks in (1, 25):
        folder, size = save(tmp_path / str(blocks), blocks)
        command = [sys.executable, __file__, str(folder)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found.append((size, float(done.stdout.split()[-1])))
    (small, first), (large, second) = found
    assert large - small > 350
    assert second - first < 0.1 * (large - small), found


if __name__ == "__main__":
    print(peak(sys.argv[1]))
