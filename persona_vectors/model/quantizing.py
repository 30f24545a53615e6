"""Models in fewer bits: what bitsandbytes and torchao are asked for while the weights are read."""

import importlib.util
from typing import Any

import torch

from persona_vectors.data.errors import InputError

LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao"}


def quantization_config(quantization: Any, dtype: torch.dtype) -> Any:
    """Return transformers' config for "nf4" or "int8", which compute in `dtype`; one of transformers' own as it is.

    Raises InputError for another name, and where the library is not installed.
    """
    if not isinstance(quantization, str):
        return quantization
    if quantization not in LIBRARIES:
        known = ", ".join(map(repr, LIBRARIES))
        raise InputError(f"quantization is {quantization!r}: give {known}, or a quantisation config of transformers'")
    library = LIBRARIES[quantization]
    if importlib.util.find_spec(library) is None:
        needed = "pip install 'persona-vectors-toolkit[quantize]'"
        raise InputError(f"quantization={quantization!r} needs {library}: {needed}")
    if library == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())
