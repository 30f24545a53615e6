"""Reads of several blocks' outputs at once, so that a decoding step is one operation and not one a block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.hooks import Edit, edit_blocks
from persona_vectors.model.tokens import Tokens

Read = Callable[[Sequence[int], Float[Tensor, "layer batch token hidden"], Tokens], None]
SMALL = 2**22
"""How many numbers wait to be read together, at most."""


@contextmanager
def read_blocks(model: Model, layers: Sequence[int], read: Read) -> Iterator[Tokens]:
    """Give `read(layers, states, tokens)` the raw outputs of blocks in every forward pass inside the `with`.

    `layers` are in order. A pass that reads one token a row gives the outputs of many blocks stacked, on one device;
    a wider one, or one with gradients, gives each block's as it comes. See `edit_blocks`.
    """
    most = SMALL / model_shape(model)[1]
    edits = {
        layer: _keeper(list(layers[: place + 1]), 0 if layer == layers[-1] else most, read)
        for place, layer in enumerate(layers)
    }
    with edit_blocks(model, edits) as tokens:
        yield tokens


def _keeper(upto: list[int], most: float, read: Read) -> Edit:
    """Return what keeps the output of the last of the layers `upto`, and gives what is kept if it has > `most` rows."""

    def keep(hidden: Tensor, tokens: Tokens) -> None:
        kept = tokens.kept
        if kept is None:
            return read(upto[-1:], hidden.detach()[None], tokens)
        if tokens.copied is not None:
            copy = hidden.clone()
            tokens.copied.append((hidden, copy))
            hidden = copy
        kept.append(hidden)
        if len(kept) * tokens.batch > most:
            tokens.kept = []
            begin = len(upto) - len(kept)
            for _, group in groupby(kept, key=attrgetter("device")):
                states = torch.stack(list(group))
                read(upto[begin : begin + len(states)], states, tokens)
                begin += len(states)
            if most == 0 and tokens.copied is not None:
                tokens.copied = None if all(torch.equal(*pair) for pair in tokens.copied) else []
        return None

    return keep
