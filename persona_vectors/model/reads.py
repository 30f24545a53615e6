"""Reads of several blocks' outputs at once, so that a decoding step is one operation and not one a block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from operator import attrgetter

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.tokens import Tokens

Read = Callable[[Sequence[int], Float[Tensor, "layer batch token hidden"], Tokens], None]
SMALL = 2**22
"""How many numbers wait to be read or worked on together, at most."""
STEPS = 32
"""How many decoding steps wait to be worked on together, at most."""


@contextmanager
def read_blocks(model: Model, layers: Sequence[int], read: Read) -> Iterator[Tokens]:
    """Give `read(layers, states, tokens)` the raw outputs of blocks in every forward pass inside the `with`.

    `layers` are in order. A pass that reads one token a row gives the outputs of many blocks stacked, on one device;
    a wider one, or one with gradients, gives each block's as it comes. See `edit_blocks`.
    """
    most = SMALL // model_shape(model)[1]

    def keep(layer: int, hidden: Tensor, tokens: Tokens) -> None:
        if tokens.kept is None:
            return read([layer], hidden.detach()[None], tokens)
        if tokens.copied is not None:
            copy = hidden.clone()
            tokens.copied.append((hidden, copy))
            hidden = copy
        elif layer == layers[0] and len(layers) * tokens.batch <= most:
            tokens.simply_kept = tokens.kept
        tokens.kept[layer] = hidden
        last = layer == layers[-1]
        if last or len(tokens.kept) * tokens.batch > most:
            _read_kept(read, tokens)
        if last and tokens.copied is not None:
            tokens.copied = None if all(torch.equal(*pair) for pair in tokens.copied) else []
        return None

    with edit_blocks(model, {layer: partial(keep, layer) for layer in layers}) as tokens:
        yield tokens


def enough(steps: Sequence[object], states: Float[Tensor, "layer batch token hidden"]) -> bool:
    """Say whether decoding steps like this one are to be worked on: those that wait cost a step but the copy."""
    return len(steps) >= STEPS or len(steps) * states.numel() > SMALL


def _read_kept(read: Read, tokens: Tokens) -> None:
    """Give `read` what was kept, stacked on each device."""
    assert tokens.kept is not None
    kept, tokens.kept, tokens.simply_kept = tokens.kept, {}, None
    tokens.fired.update(kept)
    layers, begin = list(kept), 0
    outputs = [each if isinstance(each, Tensor) else each[0] for each in kept.values()]
    for _, group in groupby(outputs, key=attrgetter("device")):
        states = torch.stack(list(group))
        read(layers[begin : begin + len(states)], states, tokens)
        begin += len(states)
