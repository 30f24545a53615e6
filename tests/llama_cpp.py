"""llama.cpp through ctypes: xllamacpp's Python API has no control vectors, but its library exports llama.cpp's own.

The structs that pass by value go as blobs larger than they are: their fields are never looked at here.
"""

import ctypes
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VERSION = "2026.10.11549"
_LOAD_CONTROL_VECTOR = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


class _Blob(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * 1024)]


class _Info(ctypes.Structure):
    """common_control_vector_load_info: a strength, and a std::string that is one pointer (manylinux2014's ABI)."""

    _fields_ = [("strength", ctypes.c_float), ("name", ctypes.c_char_p)]


class _Vector(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("capacity", ctypes.c_void_p)]


class _ControlVector(ctypes.Structure):
    """common_control_vector_data."""

    _fields_ = [("hidden", ctypes.c_int), ("data", _Vector)]


class LlamaCpp:
    """A GGUF model that reads tokens under a control vector."""

    def __init__(self, model: Path) -> None:
        package = pytest.importorskip("xllamacpp")
        if version("xllamacpp") != VERSION or sys.platform != "linux" or platform.machine() != "x86_64":
            pytest.skip(f"the layout of llama.cpp's structs is that of xllamacpp {VERSION} on x86-64 Linux")
        self._lib = ctypes.CDLL(str(next(Path(package.__file__).parent.glob("xllamacpp*.so"))))
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._quiet = ctypes.CFUNCTYPE(None, number, ctypes.c_char_p, pointer)(lambda *_: None)
        self._lib.llama_log_set(self._quiet, None)
        self._model = self._call("llama_model_load_from_file", pointer, str(model).encode(), self._defaults("model"))
        vocabulary = self._call("llama_model_get_vocab", pointer, self._model)
        self._tokens = self._call("llama_vocab_n_tokens", number, vocabulary)

    def logits(self, tokens: Sequence[int], control: Path | None = None, layer: int = 0) -> np.ndarray:
        """Return the last token's logits, with the control vector's direction of one block added to its output."""
        context = self._call("llama_init_from_model", ctypes.c_void_p, self._model, self._defaults("context"))
        self._call("llama_set_n_threads", None, context, 1, 1)
        if control:
            loaded = self._load(control)
            begin, size = loaded.data.begin, (loaded.data.end or 0) - (loaded.data.begin or 0)
            where = (ctypes.c_size_t(size // 4), loaded.hidden, layer, layer)
            assert self._call("llama_set_adapter_cvec", ctypes.c_int, context, ctypes.c_void_p(begin), *where) == 0
        ids = (ctypes.c_int * len(tokens))(*tokens)
        batch = self._call("llama_batch_get_one", _Blob, ctypes.byref(ids), len(tokens))
        assert self._call("llama_decode", ctypes.c_int, context, batch) == 0
        row = self._call("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), context, -1)
        copied = np.ctypeslib.as_array(row, (self._tokens,)).copy()
        self._call("llama_free", None, context)
        return copied

    def accepts(self, control: Path) -> bool:
        """Say whether llama.cpp's own loader reads the control vector."""
        return self._load(control).hidden > 0

    def _load(self, control: Path) -> _ControlVector:
        info, loaded = _Info(1.0, str(control).encode()), _ControlVector()
        start = ctypes.addressof(info)
        infos = _Vector(start, start + ctypes.sizeof(info), start + ctypes.sizeof(info))
        self._call(_LOAD_CONTROL_VECTOR, ctypes.c_void_p, ctypes.byref(loaded), ctypes.byref(infos))
        return loaded

    def _defaults(self, kind: str) -> _Blob:
        return self._call(f"llama_{kind}_default_params", _Blob)

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        """Call a function of the library; a pointer that one returned is passed on as a c_void_p."""
        function = self._lib[name]
        function.restype = result
        value = function(*arguments)
        return ctypes.c_void_p(value) if result is ctypes.c_void_p else value


def graphs_with_control_vectors() -> dict[str, bool]:
    """Whether each architecture's compiled graph calls what adds a control vector, itself or in what it calls."""
    library = Path(str(pytest.importorskip("xllamacpp").__file__)).with_name("xllamacpp.abi3.so")
    if version("xllamacpp") != VERSION or not shutil.which("objdump"):
        pytest.skip(f"needs xllamacpp {VERSION} and objdump")

    def lines(*command: str) -> list[str]:
        return subprocess.run([*command, str(library)], capture_output=True, text=True, check=True).stdout.splitlines()

    symbols = {name: int(at, 16) for at, _, name in map(str.split, lines("nm", "-D", "--defined-only"))}
    graphs = [name for name in symbols if re.match(r"_ZN?K?\d+llama_model_\w+graph", name)]
    begin, end = min(symbols[name] for name in graphs), max(symbols[name] for name in graphs) + 2**16
    calls: dict[str, set[str]] = {}
    for line in lines("objdump", "-d", "--no-show-raw-insn", f"--start-address={begin}", f"--stop-address={end}"):
        if starts := re.match(r"[0-9a-f]+ <([^>@]+).*>:", line):
            inside = calls.setdefault(starts[1], set())
        elif called := re.search(r"\b(?:call|jmp|bl|b)\b.*<([^>+@]+)[^+]*>", line):
            inside.add(called[1])

    def adds(name: str, seen: set[str]) -> bool:
        return "build_cvec" in name or any(adds(n, seen | {name}) for n in calls.get(name, set()) - seen)

    builders = {name: re.match(r"_ZNK\d+llama_model_(\w+)16build_arch_graph", name) for name in symbols}
    return {found[1]: adds(name, set()) for name, found in builders.items() if found}
