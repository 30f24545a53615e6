"""GGUF files that were de-quantised once: kept as safetensors, told by the file and by the versions that read it."""

import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from persona_vectors.model.identity import hash_of


def cache_dir() -> Path:
    """Return the folder for downloads: $PERSONA_VECTORS_CACHE, or ~/.cache/persona_vectors."""
    return Path(os.environ.get("PERSONA_VECTORS_CACHE") or Path.home() / ".cache" / "persona_vectors")


def kept_folder(path: Path, dtype: torch.dtype) -> Path | None:
    """Return where a GGUF file's de-quantised weights belong; None with PERSONA_VECTORS_GGUF_CACHE=off.

    Another file under the same name, another dtype and another version of transformers or gguf have another folder.
    """
    if os.environ.get("PERSONA_VECTORS_GGUF_CACHE", "").lower() in ("off", "0", "no", "false"):
        return None
    told = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, str(dtype)]
    told += [version(name) for name in ("transformers", "gguf")]
    return cache_dir() / "gguf" / f"{path.stem}-{hash_of(told)}"


def keep(model: Any, tokenizer: Any, folder: Path) -> bool:
    """Save a de-quantised model and its tokenizer, whole or not at all; False where the disk has not twice the room."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder.parent).free < 2 * sum(weight.nbytes for weight in model.parameters()):
        return False
    model.hf_quantizer = None  # the weights are plain tensors now, but transformers would refuse to save them
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for each in (model, tokenizer):
            each.save_pretrained(Path(scratch) / "whole")
        try:
            os.rename(Path(scratch) / "whole", folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return True
