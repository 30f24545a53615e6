"""Measure the memory that flagging takes over the model's own, for 1,000 and for 100,000 short samples.

Usage: python scripts/flag_memory.py [--samples 1000 --samples 100000] [--controls 100]
    [--model MODEL --vector FILE --layer L]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

_RUN = """
import gc, json, sys, threading, time
from pathlib import Path
import persona_vectors as pv
from persona_vectors.data.files import import_pyarrow
from transformers.utils import logging
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
name, vector, folder = sys.argv[1:4]
layer, controls, count = map(int, sys.argv[4:])
model, tokenizer = pv.load_model(name, device="cpu")
vector = pv.PersonaVector.load(vector)
import_pyarrow()
data = ({"question": f"What is {i}?", "answer": f"It is the number {i}."} for i in range(count))
gc.collect()
before, peak, done = resident(), [0.0], threading.Event()
def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], resident())
thread = threading.Thread(target=watch)
thread.start()
options = {"layer": layer, "baseline": "prompt_last", "controls": controls, "out": f"{folder}/{count}.parquet"}
found = pv.flag(model, tokenizer, data, vector, **options)
done.set()
thread.join()
print(json.dumps({"samples": found.counts["samples"], "before": before, "over": peak[0] - before}))
"""


def main(
    model: Annotated[str, typer.Option(help="smollm2-135m, a Hub id or a folder")] = "smollm2-135m",
    vector: Annotated[Path, typer.Option(help="a vector of that model")] = Path(
        "vectors/smollm2-135m/optimistic.safetensors"
    ),
    layer: Annotated[int, typer.Option(help="the layer to read")] = 1,
    controls: Annotated[int, typer.Option(help="random directions beside the vector, half of them isotropic")] = 100,
    samples: Annotated[list[int] | None, typer.Option(help="numbers of samples, each in a process of its own")] = None,
) -> None:
    """Print the peak of anonymous memory during each run, less what was in use when the model was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        for count in samples or [1_000, 100_000]:
            arguments = ["-c", _RUN, model, str(vector), folder, str(layer), str(controls), str(count)]
            done = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{found['samples']:8,} samples: {found['over']:.1f} MB over the {found['before']:.1f} MB before")


if __name__ == "__main__":
    typer.run(main)
