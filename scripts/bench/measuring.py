"""How the benchmarks measure: in rounds forwards and backwards, as medians of ratios taken within a round."""

import contextlib
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from persona_vectors.data.files import atomic_path
from persona_vectors.model.blocks import Model
from persona_vectors.model.passes import Row


@dataclass
class Method:
    """One way to do the work, and what it took in each round."""

    name: str
    does: str
    rows: Sequence[Row]
    run: Callable[[Sequence[Row]], object] | None = None
    """None where it cannot run here: `does` says why."""
    theirs: bool = False
    """True for other people's code, whose errors are results."""
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    """Peak memory above what was in use before; empty where the system does not tell."""

    @property
    def tokens(self) -> int:
        """The real tokens of its rows, prompts and answers, also those that it shares."""
        return sum(len(prompt) + len(answer) for prompt, answer in self.rows)


def run_rounds(methods: Sequence[Method], rounds: int, device: torch.device) -> None:
    """Run every method once a round, forwards and backwards in turn, so that a drift of the machine hits all alike."""
    able = [method for method in methods if method.run is not None]
    for method in able:  # first calls are slow
        _run(method, method.rows[:2])
    with tqdm(total=rounds * len(able), unit="run", leave=False, disable=None) as bar:
        for number in range(rounds):
            for method in able if number % 2 == 0 else reversed(able):
                bar.set_postfix_str(method.name)
                if method.run is not None:
                    seconds, megabytes = measure(partial(_run, method, method.rows), device)
                    method.seconds.append(seconds)
                    if megabytes is not None:
                        method.megabytes.append(megabytes)
                bar.update()


def measure(run: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Return the seconds that `run` takes, and its peak memory above what was in use before, in megabytes."""
    before = _reset_peak(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, None if before is None else (_peak(device) - before) / 1e6


def _run(method: Method, rows: Sequence[Row]) -> None:
    assert method.run is not None
    try:
        method.run(rows)
    except Exception as error:
        if not method.theirs:
            raise
        method.run, method.does = None, f"failed: {type(error).__name__}: {error}"
        method.seconds, method.megabytes = [], []


def synchronize(device: torch.device) -> None:
    """Wait for what the device was told to do, without which its time would be the telling's."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Start a new peak; returns the bytes in use now, or None where the system does not tell."""
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier methods freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak, VmHWM, starts anew
        return _status("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux with glibc
        return None


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def bare(model: Model, rows: Sequence[Row], *, batch_tokens: int) -> None:
    """Run the decoder, without head, on rows of one length in full batches: the least that reading can cost."""
    ids = torch.tensor([[*prompt, *answer] for prompt, answer in rows], device=model.device)
    with torch.inference_mode():
        for batch in ids.split(max(1, batch_tokens // ids.shape[1])):
            model.get_decoder()(input_ids=batch, use_cache=False)


def ratio(of: Method, to: Method, *, speed: bool = True) -> float | None:
    """Return how many times as fast as `to` (or as slow) `of` is: the median over rounds, each round by itself."""
    if not (of.seconds and to.seconds):
        return None
    scale = of.tokens / to.tokens if speed else 1.0
    pairs = zip(of.seconds, to.seconds)
    return statistics.median(scale * b / a if speed else a / b for a, b in pairs)


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % bootstrap interval of a median; None where nothing was measured."""
    if not values:
        return None
    drawn = np.random.default_rng(0).choice(np.asarray(values), (1000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print a table with aligned columns; the last one, a remark, may be long."""
    cells = [list(lines[0])] + [[_cell(value) for value in line.values()] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(lines[0]) - 1)]
    for name, *numbers, remark in cells:
        print("  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(numbers, widths[1:])), remark]).rstrip())
    print()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
    return "-" if value is None else str(value)


def environment(model: Model, name: str) -> dict[str, Any]:
    """Return, and print, what the numbers depend on."""
    parameter = next(model.parameters())
    cuda = parameter.device.type == "cuda"
    found = {
        "model": name,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(parameter.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def save(found: dict[str, Any], out: Path | None) -> None:
    if out:
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
