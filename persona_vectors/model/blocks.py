"""What a model is made of: its decoder blocks, shape and name."""

from pathlib import Path
from typing import Any

from torch import nn

from persona_vectors.data.errors import InputError
from persona_vectors.model.wrappers import unwrap

Model = Any
"""A transformers language model, PEFT-wrapped or not; or one inside nnsight's or TransformerLens's wrapper."""


def decoder_layers(model: Model) -> nn.ModuleList:
    """Return the decoder blocks: the outermost ModuleList in the decoder with one entry a hidden layer.

    Raises InputError where a model has none, as encoders do not.
    """
    model = unwrap(model)
    count = model_shape(model)[0]
    lists = [
        (name, module)
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of {count} decoder blocks: give a decoder language model")
    return min(lists, key=lambda item: item[0].count("."))[1]


def model_shape(model: Model) -> tuple[int, int]:
    """Return (number of decoder blocks, hidden size)."""
    config = unwrap(model).config.get_text_config(decoder=True)
    return getattr(config, "num_decoder_layers", None) or config.num_hidden_layers, config.hidden_size


def model_name(model: Model) -> str:
    """Return the model's Hub id, or its folder's name: never a path of the machine it was loaded on."""
    name = str(model.config._name_or_path)
    return Path(name).name if Path(name).is_absolute() else name or type(model).__name__
