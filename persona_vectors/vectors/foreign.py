"""Reading other tools' vector files as data: bounded by the file's own size, and nothing in them is ever executed."""

import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from persona_vectors.data.errors import InputError

MAX_LAYERS, MAX_HIDDEN = 1024, 2**16
_MAX_PICKLE = 2**22
_MAX_GGUF_READS = 2**17
GGUF_BLOCK_0 = "persona_vectors.direction.0"
"""Where block 0's direction is kept: readers of GGUF refuse a file with a tensor direction.0."""
_GGUF_TEXTS = ("general.architecture", "controlvector.model_hint")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double")),
}
# What the readers of malformed files raise: Python's zipfile and pickletools, torch, numpy, gguf.
_MALFORMED = (
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    EOFError,
    OverflowError,
    MemoryError,
    RuntimeError,
    OSError,
)


def read_foreign(path: Path) -> tuple[str, Any]:
    """Return the kind of a file, told by its first bytes, and what it holds.

    "pt": what was given to torch.save, of tensors and plain Python values; "gguf": `{"hint": str, "directions":
    {layer: Tensor}}`; "safetensors": its one tensor. They may still lie in the file: `checked` copies them out.

    Raises InputError where the file is damaged, too large for its kind, or holds code.
    """
    if not path.is_file():
        raise InputError(f"no vector file {path}: give the path of a .pt, .gguf or .safetensors file")
    with path.open("rb") as file:
        magic = file.read(4)
    kind = {b"PK\x03\x04": "pt", b"GGUF": "gguf"}.get(magic, "safetensors")
    read = {"pt": _read_pt, "gguf": _read_gguf, "safetensors": _read_safetensors}[kind]
    try:
        return kind, read(path)
    except InputError:
        raise
    except pickle.UnpicklingError:  # torch's own message says how to run the file's code
        raise InputError(f"{path} is no whole .{kind} file (its pickle is damaged): copy or make it again") from None
    except _MALFORMED as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path} is no whole .{kind} file ({reason}): copy or make it again") from None


def checked(value: Any, path: Path, *, ndim: int) -> Float[Tensor, "..."]:
    """Return a file's tensor as float32 in memory of its own; raises InputError for what is no vector or too large."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in _FLOATS:
        raise InputError(f"{path} holds {_what(value)} where a tensor of floats belongs: give a file of vectors")
    _check_shape(list(value.shape), path, ndim=ndim)
    if value.numel() * value.element_size() > path.stat().st_size:
        raise InputError(f"{path} declares a tensor of shape {list(value.shape)}, more than it holds: get it again")
    return value.detach().to(torch.float32, copy=True).contiguous()


def _check_shape(shape: list[int], path: Path, *, ndim: int) -> None:
    rows, hidden = (1, *shape)[-2:]
    if len(shape) != ndim or not (1 <= rows <= MAX_LAYERS + 1 and 1 <= hidden <= MAX_HIDDEN):
        wanted = "[layers, hidden]" if ndim == 2 else "[hidden]"
        raise InputError(f"{path} holds a tensor {shape}: give {wanted}, of at most {MAX_LAYERS} x {MAX_HIDDEN}")


def _what(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _read_pt(path: Path) -> Any:
    """Read what torch.save wrote, if it is made of float tensors and plain values."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise InputError(f"{path} holds compressed members, as torch.save never writes: save it again with torch")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise InputError(f"{path} declares more data than it holds: get it again")
        pickles = [member for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
            raise InputError(f"{path} is no file of torch.save with a few tensors: give a file of vectors")
        program = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and argument not in _GLOBALS:
            named = str(argument or "code").replace(" ", ".")[:100]
            raise InputError(
                f"{path} names {named}, and only float tensors, dicts, lists, strings and numbers are read: "
                "where it was made, save those alone (of an object, vars(it)) with torch.save"
            )
    # Mapped, a storage can neither reach beyond the file nor be resized.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


class _BoundedReader(GGUFReader):
    """A reader that refuses to read beyond the file's end, or on and on."""

    reads = 0

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        self.reads += 1
        if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it declares more data than it holds")
        if self.reads > _MAX_GGUF_READS:
            raise ValueError("it holds more metadata than any control vector does")
        return super()._get(offset, dtype, count, override_order)


def _read_gguf(path: Path) -> dict[str, Any]:
    reader = _BoundedReader(path)
    texts = {name: str(field.contents()) for name in _GGUF_TEXTS if (field := reader.get_field(name))}
    if texts.get("general.architecture") != "controlvector":
        raise InputError(
            f"{path} is a GGUF file of {texts.get('general.architecture', 'no architecture')!r}: "
            "give one of 'controlvector', as repeng writes them"
        )
    directions: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        name, _, number = tensor.name.partition(".")
        if name != "direction" or not (number.isascii() and number.isdigit() and len(number) < 5):
            raise InputError(
                f"{path} holds a tensor {tensor.name!r}: control vectors hold direction.1, direction.2 ..."
            )
        if tensor.tensor_type.name not in ("F32", "F16", "F64"):
            raise InputError(f"{path} holds {tensor.tensor_type.name} values: write the control vector as F32")
        directions[int(number)] = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
    first = reader.get_field(GGUF_BLOCK_0)
    if first is not None:
        directions[0] = torch.tensor(first.contents(), dtype=torch.float32)
    return {"hint": texts.get("controlvector.model_hint", "unknown"), "directions": directions}


def _read_safetensors(path: Path) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            if "format_version" in (file.metadata() or {}):
                raise InputError(f"{path} is a persona-vector file already: use it as it is")
            names = list(file.keys())
            if len(names) != 1:
                raise InputError(f"{path} holds {len(names)} tensors: give a file of one, [layers, hidden]")
            _check_shape(list(file.get_slice(names[0]).get_shape()), path, ndim=2)
            return file.get_tensor(names[0])
    except SafetensorError as error:
        raise InputError(
            f"{path} is no .pt file of torch.save, no .gguf and no whole .safetensors file ({error}): "
            "give one of those; a .pt from before torch 1.6 must be saved again"
        ) from None
