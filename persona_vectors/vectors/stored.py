"""A vector's file: safetensors, with a header in JSON and a checksum of all that it holds."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path

FORMAT = 1


def write(path: str | Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the file, whole or not at all: tensors in float32, each field as JSON."""
    plain = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    fields = {"format_version": FORMAT, **fields}
    header = {name: json.dumps(value, ensure_ascii=False) for name, value in fields.items()}
    header["checksum"] = _checksum(header, plain)
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata=header)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a file's fields and tensors; raises InputError where it is truncated, changed or of another version."""
    if not path.is_file():
        raise InputError(f"no vector file {path}: give the path of a .safetensors file, or make one with extract")
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is no whole safetensors file ({error}): extract or copy it again") from None
    if "format_version" not in header:
        raise InputError(f"{path} has no persona-vector header: make it with extract, or convert it with import")
    if header["format_version"] != str(FORMAT):
        raise InputError(
            f"{path} has format version {header['format_version']}, and this release reads {FORMAT}: "
            "update persona_vectors, or extract the vector again"
        )
    if header.pop("checksum", None) != _checksum(header, tensors):
        raise InputError(f"{path} was changed after it was written (its checksum differs): get the original again")
    return {name: json.loads(value) for name, value in header.items()}, tensors


def _checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(header.items()))).encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
