"""A vector's best layer, beside random directions' best ones."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from persona_vectors.flagging.results import Best
from persona_vectors.vectors.controls import random_null
from persona_vectors.vectors.nulls import halves

KEPT = 20_000
"""The most rows of a file whose random directions are looked at one by one, drawn at random."""


def best_layer(
    own: Sequence[float], null: Mapping[str, np.ndarray], layers: Sequence[int], chance: float
) -> Best | None:
    """Return the layer at which a vector's score lies furthest from `chance`, beside random directions' best layers.

    `own` is [layer], and `null` has a layer's random directions' under `controls@LAYER`, the first half isotropic.
    None where a score is unknown.
    """
    mine, random = np.abs(np.array(own) - chance), np.abs(np.stack(list(null.values()), axis=-1) - chance)
    if not len(random) or not np.isfinite(mine).all() or not np.isfinite(random).all():
        return None
    found = [random_null(torch.from_numpy(mine), torch.from_numpy(half)) for half in halves(random)]
    place = found[0].layer
    return Best(layers[place], float(own[place]), *[each.percentile / 100 for each in found])
