"""What tells one model, template or setting from another."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_vectors.model.blocks import Model, model_name, model_shape
from persona_vectors.model.wrappers import unwrap


def identity(model: Model, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what tells this model and its template from another: name, revision, and hashes of both."""
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config")
    model = unwrap(model)
    config = {key: value for key, value in model.config.to_dict().items() if key not in volatile}
    return {
        "model": model_name(model),
        "revision": getattr(model.config, "_commit_hash", None),
        "config_hash": hash_of(config),
        "template_hash": hash_of(tokenizer.chat_template),
        "layers_x_hidden": list(model_shape(model)),
    }


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(model: Model) -> str:
    """Return a hash of some of each weight's values, which tells a checkpoint from the next one."""
    digest = hashlib.sha256()
    for name, weight in unwrap(model).named_parameters():
        values = weight.detach().reshape(-1)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if values.device.type != "meta":  # offloaded weights are left out
            digest.update(values[:: max(1, len(values) // 8)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
