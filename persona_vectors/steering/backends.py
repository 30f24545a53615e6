"""A persona vector for people who work inside TransformerLens or nnsight; neither library is imported."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Layer, decoder_layers, one_layer
from persona_vectors.model.wrappers import unwrap
from persona_vectors.vectors.directions import incremental
from persona_vectors.vectors.vector import PersonaVector


def lens_hooks(
    vector: PersonaVector, *, layer: Layer, coef: float | None = None, dose: float | None = None
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Return TransformerLens hooks that steer: `bridge.run_with_hooks(tokens, fwd_hooks=pv.lens_hooks(...))`.

    They add to the residual stream after each block, at every token. See `steer` for `coef`, `dose` and several layers.
    """

    strength, directions = incremental(vector, layer=layer, coef=coef, dose=dose)

    def adds(direction: Tensor) -> Callable[..., Tensor]:
        return lambda hidden, hook=None: hidden + (strength * direction).to(hidden.device, hidden.dtype)

    return [(f"blocks.{index}.hook_out", adds(direction)) for index, direction in directions.items()]


def steer_trace(
    model: Any,
    vector: PersonaVector,
    *,
    layer: Layer,
    coef: float | None = None,
    dose: float | None = None,
) -> None:
    """Steer inside an nnsight trace: `with model.trace(prompt): pv.steer_trace(model, vector, layer=13, coef=2.0)`.

    Call it before anything in the trace reads a later block. See `steer` for `coef`, `dose` and several layers.
    """
    vector.check_fits(model)
    strength, directions = incremental(vector, layer=layer, coef=coef, dose=dose)
    for index, direction in directions.items():
        block = nnsight_block(model, index)
        output = block.output
        hidden = output[0] if isinstance(output, tuple) else output
        steered = hidden + (strength * direction).to(hidden.device, hidden.dtype)
        block.output = (steered, *output[1:]) if isinstance(output, tuple) else steered


def nnsight_block(model: Any, layer: Layer) -> Any:
    """Return the part of an nnsight model whose `.output` is decoder block `layer`'s, whatever the architecture."""
    inner = unwrap(model)
    if inner is model:
        raise InputError(f"{type(model).__name__} is no nnsight model: wrap it, or use steer and monitor as it is")
    blocks = decoder_layers(inner)
    block = blocks[one_layer(layer, len(blocks))]
    path = next(name for name, module in inner.named_modules() if module is block)
    return model.get(path)
