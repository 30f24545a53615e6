"""Bring vectors from other tools, and take them there: what each format holds, in its own conventions."""

from pathlib import Path

from persona_vectors.data.errors import InputError

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
    """Return a format's own name: "repeng" is gguf; raises InputError where there is none."""
    name = "gguf" if name == "repeng" else name
    if name not in FORMATS:
        raise InputError(f"format is {name!r}: give one of {', '.join(FORMATS)}")
    return name


def official_pooling(path: Path) -> str:
    """Return what an official file's name says of its pooling."""
    return next((ours for theirs, ours in _OFFICIAL_POOLING.items() if f"{theirs}_diff" in path.name), "unknown")
