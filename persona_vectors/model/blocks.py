"""What a model is made of: its decoder blocks, shape and name."""

import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsIndex

from torch import nn

from persona_vectors.data.errors import InputError
from persona_vectors.model.wrappers import unwrap

Model = Any
"""A transformers language model, PEFT-wrapped or not; or one inside nnsight's or TransformerLens's wrapper."""
Layer = SupportsIndex | Iterable[SupportsIndex] | str
"""A decoder block's index from 0 (a Python, numpy or torch integer), several of them, or "all"."""


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
    found = unwrap(model)
    if not hasattr(found, "config"):
        raise InputError(f"model is {type(found).__name__}: the model comes first, such as load_model's first value")
    config = found.config.get_text_config(decoder=True)
    return getattr(config, "num_decoder_layers", None) or config.num_hidden_layers, config.hidden_size


def model_name(model: Model) -> str:
    """Return the model's Hub id, or its folder's name: never a path of the machine it was loaded on."""
    model = unwrap(model)
    name = str(model.config._name_or_path)
    return Path(name).name if Path(name).is_absolute() else name or type(model).__name__


def chosen_layers(layer: Layer, blocks: int) -> list[int]:
    """Return the block indices that `layer` names, in order; `blocks` is how many there are.

    Raises InputError where it names none, one that is not there, or something else than whole numbers and "all".
    """
    if isinstance(layer, str):
        if layer != "all":
            raise InputError(f"layer is {layer!r}: give a number, several numbers, or 'all'")
        return list(range(blocks))
    given: Any = [layer] if _is_number(layer) else layer
    if not isinstance(given, Iterable) or not all(map(_is_number, given := list(given))):
        raise InputError(f"layer is {layer!r}: give a whole number, several numbers, or 'all'")
    chosen = sorted({operator.index(index) for index in given})
    if not chosen:
        raise InputError("layer names no layer: give a number, several numbers, or 'all'")
    for index in chosen:
        if not 0 <= index < blocks:
            raise InputError(f"layer {index} is out of range: this model has layers 0 to {blocks - 1}")
    return chosen


def one_layer(layer: Layer, blocks: int) -> int:
    """Return the one block index that `layer` names; raises InputError where it names several, or as above."""
    chosen = chosen_layers(layer, blocks)
    if len(chosen) > 1:
        raise InputError(f"layer is {layer!r}: give one layer here")
    return chosen[0]


def _is_number(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool) and not getattr(value, "ndim", 0)
