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
IGNORED_BY_LLAMA_CPP = (
    "bert", "clef", "clip", "dflash", "eagle3", "eurobert", "gemma4_assistant", "hy_v4", "jina_bert_v2", "jina_bert_v3",
    "modern_bert", "neo_bert", "nomic_bert", "nomic_bert_moe", "plamo2", "qwen4exp", "wavtokenizer_dec",
)  # fmt: skip
"""The architectures to whose blocks llama.cpp adds no control vector, without a word: build 11549 of October 2026, from
its compiled graphs, which a test reads again."""
_OFFICIAL_POOLING = {"response_avg": "response_mean", "prompt_avg": "prompt_mean", "prompt_last": "prompt_last"}


def format_named(name: str) -> str:
    """Return a format's own name: "repeng" and "easysteer" are gguf; raises InputError where there is none."""
    name = "gguf" if name in ("repeng", "easysteer") else name
    if name not in FORMATS:
        raise InputError(f"format is {name!r}: give one of {', '.join(FORMATS)}")
    return name


def ignored_by_llama_cpp(architecture: str) -> bool:
    """Say whether llama.cpp loads a control vector for an architecture, and then does nothing with it."""
    return architecture.replace("-", "").replace("_", "") in {name.replace("_", "") for name in IGNORED_BY_LLAMA_CPP}


def official_pooling(path: Path) -> str:
    """Return what an official file's name says of its pooling."""
    return next((ours for theirs, ours in _OFFICIAL_POOLING.items() if f"{theirs}_diff" in path.name), "unknown")
