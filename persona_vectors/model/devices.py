"""Where a model takes its input, what its adapters put before it, and constants on the devices that it is on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


def constant(values: Tensor) -> Callable[..., Tensor]:
    """Return what gives the values on a device, and in a dtype if it is given one: copied there once, not each pass."""
    ready: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(device: torch.device, dtype: torch.dtype = values.dtype) -> Tensor:
        if (device, dtype) not in ready:
            with torch.inference_mode(False):  # or a training step could not use what a generation has copied
                ready[device, dtype] = values.to(device, dtype)
        return ready[device, dtype]

    return on
