"""Attention heads: what each says at an answer's end, and shifts of it baked into the output projections' biases."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, decoder_layers, model_shape
from persona_vectors.model.passes import Row, forward_passes, own_tokens, read_pass
from persona_vectors.model.wrappers import unwrap


def head_projections(model: Model) -> list[nn.Linear]:
    """Return each block's attention output projection, which is given the heads' outputs side by side.

    Raises InputError for models whose blocks have no attention that ends in one.
    """
    found = []
    for index, block in enumerate(decoder_layers(model)):
        within = [child for name, child in block.named_children() if "att" in name]
        linear = [m for child in within for m in child.modules() if isinstance(m, nn.Linear)]
        if not linear or linear[-1].in_features % _heads(model) or linear[-1].out_features != model_shape(model)[1]:
            raise InputError(f"block {index} has no attention that ends in a linear layer: give a model that has")
        found.append(linear[-1])
    return found


def head_states(model: Model, rows: Sequence[Row]) -> Float[Tensor, "row layer head dim"]:
    """Return the heads' outputs at each row's last token, as the output projections are given them."""
    modules, heads = head_projections(model), _heads(model)
    found = torch.zeros(len(rows), len(modules), heads, modules[0].in_features // heads, dtype=torch.float32)

    def reader(layer: int) -> Callable[[nn.Module, Any], None]:
        def read(_: nn.Module, given: tuple[Tensor]) -> None:
            if step.answers:
                ends = step.position.argmax(dim=1)
                last = own_tokens(given[0], step)[torch.arange(len(ends)), ends.to(given[0].device)]
                found[[members[0] for members in step.rows], layer] = last.float().cpu().unflatten(1, (heads, -1))

        return read

    with ExitStack() as stack, torch.inference_mode():
        for layer, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(reader(layer)).remove)
        for step in forward_passes(model, rows):
            with step.attempt:
                read_pass(model, step)
    return found


@contextmanager
def shift_heads(model: Model, shifts: Float[Tensor, "layer head dim"]) -> Iterator[None]:
    """Add a shift to each head's output at every token inside the `with`, without a hook.

    W (x + s) + b = W x + (W s + b), so the shifts are biases of the output projections (Li et al. 2023, section 3.3).
    These are the ones that they were afterwards, also after an error. They are as precise as the model's dtype.
    """
    modules = head_projections(model)
    before = [module.bias for module in modules]
    try:
        for module, bias, shift in zip(modules, before, shifts):
            with torch.no_grad():
                moved = module.weight.float() @ shift.flatten().to(module.weight.device, torch.float32)
                moved = moved if bias is None else moved + bias.float()
            module.bias = nn.Parameter(moved.to(module.weight.dtype), requires_grad=False)
        yield
    finally:
        for module, bias in zip(modules, before):
            module.bias = bias


def _heads(model: Model) -> int:
    return unwrap(model).config.get_text_config(decoder=True).num_attention_heads
