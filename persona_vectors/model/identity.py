"""What tells one model, template or setting from another."""

import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, model_name, model_shape
from persona_vectors.model.wrappers import unwrap


def identity(model: Model, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what tells this model and its template from another: name, revision, and hashes of both."""
    return {
        "model": model_name(model),
        "revision": getattr(unwrap(model).config, "_commit_hash", None),
        "config_hash": config_hash(model),
        "template_hash": hash_of(tokenizer.chat_template),
        "layers_x_hidden": list(model_shape(model)),
    }


def config_hash(model: Model) -> str:
    """Return a hash of a model's config, without what depends on how and where it was loaded."""
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config")
    return hash_of({key: value for key, value in unwrap(model).config.to_dict().items() if key not in volatile})


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(model: Model) -> str:
    """Return a hash of some of each weight's values, which tells a checkpoint from the next one.

    Quantised weights, which may be buffers or several tensors in one, and weights that are offloaded count too.
    """
    model = unwrap(model)
    digest = hashlib.sha256()
    for name, weight in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        for part in _plain(_loaded(model, name, weight.detach())):
            values = part.reshape(-1)
            some = values[:: max(1, len(values) // 8)].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes() if len(some) else b"")
    return digest.hexdigest()[:16]


def _plain(weight: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a weight is made of: itself, or what a quantised or sharded one wraps."""
    if hasattr(weight, "to_local"):
        weight = weight.to_local()
    if type(weight) in (Tensor, nn.Parameter) or not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _plain(getattr(weight, name))


def _loaded(model: Model, name: str, weight: Tensor) -> Tensor:
    """Return a weight's values, also where accelerate keeps them elsewhere between passes."""
    if weight.device.type != "meta":
        return weight
    path, _, own = name.rpartition(".")
    values: Any = getattr(getattr(model.get_submodule(path), "_hf_hook", None), "weights_map", None)
    if values is None or own not in values:
        raise InputError(f"the weight {name} is not loaded, so that this model cannot be told from another: load it")
    return values[own]
