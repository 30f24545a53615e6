"""Bring vectors from other tools, and take them there: what each format holds, in its own conventions."""

import json
from pathlib import Path

from persona_vectors.data.errors import InputError
from persona_vectors.data.texts import DATA

FORMATS = {
    "official": ".pt",
    "assistant-axis": ".pt",
    "assistant-axis-capping": ".pt",
    "steering-vectors": ".pt",
    "lm-eval": ".pt",
    "gguf": ".gguf",
    "safetensors": ".safetensors",
}
"""Each format's name and file suffix. "gguf" is the control vector of repeng and of servers of GGUF models."""
_OFFICIAL_POOLING = {"response_avg": "response_mean", "prompt_avg": "prompt_mean", "prompt_last": "prompt_last"}


def format_named(name: str) -> str:
    """Return a format's own name: "repeng" and "easysteer" are gguf; raises InputError where there is none."""
    name = "gguf" if name in ("repeng", "easysteer") else name
    if name not in FORMATS:
        raise InputError(f"format is {name!r}: give one of {', '.join(FORMATS)}")
    return name


def ignored_by_llama_cpp() -> list[str]:
    """Return the architectures to whose blocks llama.cpp adds no control vector, without a word.

    They are those of one build, from its compiled graphs, which a test reads again.
    """
    found: list[str] = json.loads((DATA / "no_control_vectors.json").read_text(encoding="utf-8"))["ignored"]
    return found


def official_pooling(path: Path) -> str:
    """Return what an official file's name says of its pooling."""
    return next((ours for theirs, ours in _OFFICIAL_POOLING.items() if f"{theirs}_diff" in path.name), "unknown")
