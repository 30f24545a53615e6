"""Every verb that reads or edits a block takes its layer in the same forms, and refuses the same."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import zoo
from helpers import random_direction

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import one_layer
from persona_vectors.monitoring.projection import project
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import RowEdit, steer, steer_rows
from persona_vectors.steering.backends import lens_hooks
from persona_vectors.steering.bounds import ablate, cap, floor, rotate, steer_where
from persona_vectors.vectors.controls import random_vectors

EDITS = {
    "steer": lambda model, vector, layer: steer(model, vector, layer=layer, coef=2.0),
    "ablate": lambda model, vector, layer: ablate(model, vector, layer=layer),
    "cap": lambda model, vector, layer: cap(model, vector, layer=layer, limit=-1.0),
    "floor": lambda model, vector, layer: floor(model, vector, layer=layer, limit={1: 1.0}),
    "rotate": lambda model, vector, layer: rotate(model, vector, layer=layer, angle=60.0),
    "steer_where": lambda model, vector, layer: steer_where(model, vector, layer=layer, coef=2.0, when=lambda p: p > 0),
}
READS = {
    "monitor": lambda model, tokenizer, vector, layer: monitor_values(model, vector, layer),
    "project": lambda model, tokenizer, vector, layer: (
        project(model, tokenizer, [("How?", "So.")], vector, layer=layer).values
    ),
    "lens_hooks": lambda model, tokenizer, vector, layer: [
        (name, hook(torch.zeros(32)).tolist()) for name, hook in lens_hooks(vector, layer=layer, coef=1.0)
    ],
    "random_vectors": lambda model, tokenizer, vector, layer: torch.stack(
        [each.directions for each in random_vectors(model, tokenizer, vector, layer=layer, count=2)]
    ),
}
ONE = [np.int64(1), torch.tensor(1), [np.int64(1)], (torch.tensor(1),), np.array([1])]
REFUSED = [
    ([], "layer names no layer"),
    (True, "layer is True: give a whole number"),
    ([True], "give a whole number"),
    (3, "layer 3 is out of range"),
]


def monitor_values(model, vector, layer) -> torch.Tensor:
    with monitor(model, vector, layer=layer) as trace, torch.no_grad():
        model(**zoo.inputs(model))
    return trace["t"]


def logits(model, edit) -> torch.Tensor:
    with edit, torch.no_grad():
        return model(**zoo.inputs(model)).logits


@pytest.mark.parametrize("verb", EDITS)
def test_edits_take_any_whole_number(model, verb: str):
    vector = random_direction(model)
    expected = logits(model, EDITS[verb](model, vector, 1))
    assert not torch.equal(expected, logits(model, nullcontext()))
    for layer in ONE:
        assert torch.equal(logits(model, EDITS[verb](model, vector, layer)), expected)
    for layer, message in REFUSED:
        with pytest.raises(InputError, match=message), EDITS[verb](model, vector, layer):
            pass


@pytest.mark.parametrize("verb", READS)
def test_readings_take_any_whole_number(model, tokenizer, verb: str):
    vector = random_direction(model)
    expected = READS[verb](model, tokenizer, vector, 1)
    for layer in ONE:
        found = READS[verb](model, tokenizer, vector, layer)
        assert found == expected if isinstance(found, list) else found.allclose(expected, equal_nan=True)
    for layer, message in REFUSED:
        with pytest.raises(InputError, match=message):
            READS[verb](model, tokenizer, vector, layer)


def test_one_layer_is_one(model):
    vector = random_direction(model)
    assert one_layer([torch.tensor(2)], 3) == 2
    with pytest.raises(InputError, match=r"layer is \[0, 1\]: give one layer here"):
        with EDITS["steer_where"](model, vector, [0, 1]):
            pass
    rows = [RowEdit(vector, np.int64(1), 2.0), RowEdit(vector, torch.tensor(1), 2.0)]
    plain = [RowEdit(vector, 1, 2.0)] * 2
    assert torch.equal(logits(model, steer_rows(model, rows)), logits(model, steer_rows(model, plain)))
    with pytest.raises(InputError, match="layer is True"), steer_rows(model, [RowEdit(vector, True, 2.0)] * 2):
        pass


@pytest.mark.parametrize("layer", [np.int64(1), torch.tensor(1)])
def test_a_vector_s_own_direction_and_projection(model, layer):
    vector = random_direction(model)
    assert torch.equal(vector.direction(layer), vector.directions[1])
    assert torch.equal(vector.project(torch.ones(32), layer=layer), vector.project(torch.ones(32), layer=1))
    for wrong in (True, -1, np.int64(3)):
        with pytest.raises(InputError, match=r"is out of range: PersonaVector.* has layers 0 to 2"):
            vector.direction(wrong)
