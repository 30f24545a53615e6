"""Where a model takes its input, and what its adapters put before it."""

from typing import Any

import torch
from torch import nn

from persona_vectors.model.blocks import Model
from persona_vectors.model.wrappers import unwrap


def input_device(model: Model) -> torch.device:
    """Return the device that token ids belong on, also where the embeddings are offloaded between passes."""
    embeddings = unwrap(model).get_input_embeddings()
    weight = next(embeddings.parameters())
    if weight.device.type != "meta":
        return weight.device
    return torch.device(getattr(embeddings._hf_hook, "execution_device", "cpu"))


def base(model: Model) -> nn.Module:
    """Return the transformers model inside PEFT's wrapper."""
    model = unwrap(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def virtual_tokens(model: Model) -> bool:
    """Say whether a PEFT adapter learns tokens or cached keys instead of weights: prompt, prefix or p-tuning."""
    config: Any = getattr(unwrap(model), "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))
