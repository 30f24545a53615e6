"""How an answer's log-probability changes with the residual stream: what training on it pulls the model towards."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from persona_vectors.data.progress import bar
from persona_vectors.model.blocks import Layer, Model, chosen_layers, model_shape
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.passes import Row, forward_passes, own_tokens
from persona_vectors.model.pooling import token_weights
from persona_vectors.model.prompts import batch_tokens_for
from persona_vectors.model.tokens import Tokens


def answer_gradients(
    model: Model,
    rows: Sequence[Row],
    *,
    kept: Sequence[Sequence[int]] | None = None,
    layer: Layer = "all",
    batch_tokens: int | None = None,
) -> Float[Tensor, "row layer hidden"]:
    """Return the gradient of each answer's mean log-probability by a shift of the residual stream, in nats a unit.

    The shift is one vector, added to the raw output of the block at every token. Along v it is what steering with v
    changes at first: d/dc of the mean log-probability, at c = 0, is gradient @ v. A step of training on the answer
    moves the residual stream along it, to first order. `kept` says which tokens of each answer count, from 0; all
    unless it is given. nan where none does.
    """
    kept = [range(len(answer)) for _, answer in rows] if kept is None else kept
    layers, read = chosen_layers(layer, model_shape(model)[0]), [i for i, chosen in enumerate(kept) if chosen]
    budget = (batch_tokens or batch_tokens_for(model)) // 4  # logits, and what the backward pass needs of each block
    states: dict[int, Tensor] = {}

    def reader(index: int) -> Callable[[Tensor, Tokens], Tensor]:
        def keep(hidden: Tensor, _: Tokens) -> Tensor:
            states[index] = hidden.detach().requires_grad_() if index == min(layers) else hidden
            return states[index]

        return keep

    hooked = edit_blocks(model, {index: reader(index) for index in layers})
    with bar(desc="gradients", unit="answers", total=len(read)) as shown, torch.inference_mode(False), hooked:
        found = torch.full((len(rows), len(layers), model_shape(model)[1]), torch.nan, dtype=torch.float32)
        # each row is a group of its own: prompts that were read once would have no gradient
        for step in forward_passes(model, [rows[i] for i in read], batch_tokens=budget, groups=range(len(read))):
            index = [read[members[0]] for members in step.rows]
            weights = token_weights(step.position, [(len(rows[i][0]), kept[i]) for i in index], ["response_mean"])
            weights = weights[:, 0, 1:]
            counted, targets = weights > 0, step.inputs["input_ids"][:, 1:]
            states.clear()
            with step.attempt, torch.enable_grad():
                logits = own_tokens(model(**step.inputs).logits, step)[:, :-1][counted].float()
                losses = cross_entropy(logits, targets[counted], reduction="none") * weights[counted]
                gradients = torch.autograd.grad(-losses.sum(), [states[k] for k in layers])
            if step.attempt.failed:
                continue
            found[index] = torch.stack([own_tokens(g, step).float().sum(dim=1).cpu() for g in gradients], dim=1)
            shown.update(len(index))
    return found
