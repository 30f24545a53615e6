"""Long commands: stopped by Ctrl-C at a third they go on, to end as one that was not stopped; and none is ever silent.

Silence is measured on a pty, by a clock that a pass of the model moves by two seconds and nothing else does.
"""

import contextlib
import fcntl
import functools
import io
import json
import os
import pty
import signal
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch
import zoo
from helpers import lora, random_direction, run, save_tiny
from transformers.models.llama.modeling_llama import LlamaModel

from persona_vectors.cli.main import main
from persona_vectors.data import texts
from persona_vectors.evaluation import likelihood
from persona_vectors.extraction import filtering
from persona_vectors.flagging import run as flagging
from persona_vectors.vectors.vector import PersonaVector

SMALL = ["--device", "cpu", "--batch-tokens", 60, "--max-new-tokens", 3]
STEERED = ["--layer", 1, "--controls", 2]
UNSEEN = ["--controls", 0, "--cache", "cache"]
COMMANDS = {
    "extract": ["{model}", "{trait}", *SMALL, "--judge", "none", "--samples", 1, "--out", "v.safetensors"],
    "evaluate": ["{model}", "{trait}", *SMALL, "--vector", "{vector}", "--layer", 1, "--coef", 2, "--samples", 2],
    "contrast": ["{model}", "{vector}", *SMALL[:2], *STEERED, "--max-perplexity", 99],
    "sweep": ["{model}", "{trait}", "{vector}", *SMALL, *STEERED, "--coefs", 1, "--gate", 0, "--judge", "sentiment"],
    "flag": [
        "{model}",
        "{vector}",
        *SMALL,
        "--layer",
        1,
        "--data",
        "{data}",
        "--controls",
        0,
        "--out",
        "f.parquet",
        "--cache",
        "cache",
    ],
    "finetune": ["{config}"],
    "shift": ["{model}", "{vector}", *SMALL, "--layer", 1, "--tuned", "{tuned}", "--questions", "{questions}"],
}
FILES = {"extract": "v.safetensors", "flag": "f.parquet", "finetune": "tuned/adapter_model.safetensors"}


class Passes:
    """Counts the model's forward passes, and presses Ctrl-C at the start of one of them."""

    def __init__(self) -> None:
        self.count, self.stop_at = 0, 0

    @contextmanager
    def watched(self, stop_at: int = 0) -> Iterator[None]:
        self.count, self.stop_at = 0, stop_at
        plain = LlamaModel.forward

        @functools.wraps(plain)
        def forward(model, *arguments, **options):
            self.count += 1
            if self.count == self.stop_at:
                signal.raise_signal(signal.SIGINT)
            return plain(model, *arguments, **options)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a background shell starts ignores it
        try:
            with mock.patch.object(LlamaModel, "forward", forward):
                yield
        finally:
            signal.signal(signal.SIGINT, before)


@pytest.fixture
def given(tmp_path, trait, monkeypatch) -> dict[str, Path]:
    """The files that the commands are given, and in place of the neutral texts that ship a few short ones."""
    folder = tmp_path / "given"
    folder.mkdir()
    monkeypatch.setattr(texts, "DATA", folder)
    monkeypatch.setattr(likelihood, "DATA", folder)
    (folder / "statements").mkdir()
    (folder / "neutral.json").write_text(json.dumps([["How?", "So it is."], ["Why?", "By that."]]))
    (folder / "assistants.json").write_text(json.dumps(["", "Help.", "Do help."]))
    pairs = [{"pos": f"yes {i}", "neg": f"no {i}"} for i in range(10)]
    (folder / "statements" / "optimistic.json").write_text(json.dumps({"question": "How?", "pairs": pairs}))
    (folder / "questions.txt").write_text("\n".join(f"How {i}?" for i in range(6)))
    model = save_tiny(folder / "tiny")
    lora(zoo.build("llama")).save_pretrained(folder / "adapter")
    trait.save(folder / "loud.json")
    replace(random_direction(zoo.build("llama")), trait="optimistic", residual_norms=torch.ones(3)).save(folder / "v")
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    (folder / "talks.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    rows = [{"question": f"{i}?", "answer": "ab" * (i + 1)} for i in range(12)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {"model": str(model), "training_file": str(folder / "talks.jsonl"), "output_dir": "tuned", "max_steps": 3}
    config |= {"save_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    (folder / "config.json").write_text(json.dumps(config))
    names = {"trait": "loud.json", "vector": "v", "data": "data.jsonl", "config": "config.json", "tuned": "adapter"}
    names["questions"] = "questions.txt"
    return {"model": model} | {key: folder / name for key, name in names.items()}


def found(command: str, printed: str) -> object:
    """What a command found: its table, and the numbers of the file that it wrote."""
    path = Path(FILES.get(command, ""))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pydict()
    if command == "finetune":
        return path.read_bytes()
    return PersonaVector.load(path).directions if command == "extract" else json.loads(printed)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_interrupted_at_a_third_goes_on(command, given, tmp_path, monkeypatch):
    words = [command, *(str(word).format(**given) for word in COMMANDS[command])]
    words += [] if command == "finetune" else ["--json"]
    passes, results, counts = Passes(), {}, {}
    monkeypatch.setattr(flagging, "flag", functools.partial(flagging.flag, chunk=3))
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "stopped":
            with passes.watched(stop_at=max(2, counts["whole"] // 3)):
                _, told = run(*words, code=130)
            assert "interrupted: the same command" in told.splitlines()[-1]
            assert "goes on" in told.splitlines()[-1] and "Traceback" not in told
        with passes.watched():
            printed, _ = run(*words, *(["--resume"] if (command, name) == ("finetune", "stopped") else []))
        results[name], counts[name] = found(command, printed), passes.count
    assert counts["stopped"] < counts["whole"]  # it did not begin anew
    if command == "extract":  # answers that are read back are read in batches of their own
        torch.testing.assert_close(results["stopped"], results["whole"], rtol=1e-3, atol=1e-5)
    elif command == "flag":
        for column, values in results["whole"].items():
            near = pytest.approx(values, rel=1e-4, abs=1e-5, nan_ok=True) if isinstance(values[0], float) else values
            assert results["stopped"][column] == near, column
    else:
        assert results["stopped"] == results["whole"]


class Terminal(io.TextIOWrapper):
    """A pty to write to, with a clock; it notes the longest time that passes without a byte, and what stood before."""

    def __init__(self) -> None:
        reads, writes = pty.openpty()
        fcntl.ioctl(writes, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # tqdm shows nothing where it is 0
        super().__init__(os.fdopen(writes, "wb", buffering=0), encoding="utf-8", write_through=True)
        self.now = self.last = 1e9
        self.silence, self.before, self.line = 0.0, "", ""
        threading.Thread(target=_drain, args=[reads], daemon=True).start()

    def write(self, text: str) -> int:
        if text:
            self.heard()
            self.line = (self.line + text)[-200:]
        return super().write(text)

    def heard(self) -> None:
        if self.now - self.last > self.silence:
            self.silence, self.before = self.now - self.last, self.line
        self.last = self.now


def _drain(reads: int) -> None:
    with contextlib.suppress(OSError):  # the other end is closed
        while os.read(reads, 65536):
            pass


LONGER = {
    "extract": ["--max-new-tokens", 12, "--judge", "contrast", "--samples", 2],
    "evaluate": ["--max-new-tokens", 12, "--judge", "contrast"],
    "sweep": ["--max-new-tokens", 12, "--coefs", "1,2"],
    "flag": ["--max-new-tokens", 12, "--controls", 20],
    "shift": ["--max-new-tokens", 12, "--controls", 20],
}
UNKEPT = {  # what begins anew is not interrupted above
    "steer": ["{model}", "{vector}", "--layer", 1, "--coef=-1,0,1", "--max-new-tokens", 12, "--question", "How?"],
    "demo": ["--model", "{model}", "--trait", "{trait}", "--out", "demo"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, *UNKEPT])
def test_no_phase_of_a_command_is_silent_for_longer_than_five_seconds(command, given, monkeypatch):
    words = [*{**COMMANDS, **UNKEPT}[command], *LONGER.get(command, [])]
    config = json.loads(given["config"].read_text()) | {"gradient_accumulation_steps": 4, "max_steps": 2}
    given["config"].write_text(json.dumps(config))
    monkeypatch.setattr(filtering, "passes", lambda *_: True)  # a random model's answers show no trait
    terminal, plain = Terminal(), LlamaModel.forward

    @functools.wraps(plain)
    def forward(model, *arguments, **options):
        terminal.now += 2
        return plain(model, *arguments, **options)

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("persona_vectors.data.progress.time", SimpleNamespace(time=lambda: terminal.now))
    monkeypatch.setattr("tqdm.std.time", lambda: terminal.now)
    monkeypatch.setattr(LlamaModel, "forward", forward)
    monkeypatch.setattr(sys, "argv", ["persona-vectors", command, *(str(word).format(**given) for word in words)])
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal), pytest.raises(SystemExit) as stop:
        main()
    terminal.heard()
    assert stop.value.code == 0, terminal.line
    assert terminal.now - 1e9 > 15  # it was long
    assert terminal.silence <= 5, f"{terminal.silence} s after {terminal.before!r}"
