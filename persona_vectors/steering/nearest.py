"""A coefficient that depends on the stored activations that a hidden state is nearest to (K-CAST)."""

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.model.devices import constant
from persona_vectors.steering.bounds import Coefficient
from persona_vectors.vectors.directions import projections


def nearest_coef(states: Float[Tensor, "row hidden"], coefs: Float[Tensor, " coef"], *, k: int = 8) -> Coefficient:
    """Return a `coef` for `steer_where`: the mean coefficient of the `k` stored states that are nearest to a token's.

    `states` are of the block that is steered, say `pool(model, rows, layer=13).means[:, 0, 0]`, and `coefs` what to
    steer with near each: 0 for those that need no steering. Near is a large cosine, of what is left after the stored
    states' mean is taken away; without that all hidden states of a model look alike.

    Raises InputError where their numbers differ, or k is not from 1 to that number.
    """
    if len(states) != len(coefs) or not 1 <= k <= len(coefs):
        raise InputError(f"{len(states)} states, {len(coefs)} coefs and k={k}: give one coef a state, and k up to that")
    mean = states.float().mean(dim=0)
    centre, values = constant(mean), constant(coefs.float())
    units = constant(torch.nn.functional.normalize(states.float() - mean, dim=1))

    def near(hidden: Tensor) -> Tensor:
        moved = hidden.float() - centre(hidden.device)  # its length changes no order
        found = projections(moved, units(hidden.device)).topk(k, dim=-1).indices
        return values(hidden.device)[found].mean(dim=-1)

    return near
