"""rotate, and coefficients by the nearest stored activations: against the formulas, token by token."""

import math

import pytest
import torch
import zoo
from helpers import DECODERS, block_output, hooks, random_direction
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.steering.add import steer
from persona_vectors.steering.bounds import ablate, rotate, steer_where
from persona_vectors.steering.nearest import nearest_coef


def degrees(states: Tensor, direction: Tensor) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(states.double(), direction.double(), dim=-1)
    return torch.rad2deg(cosine.clamp(-1, 1).arccos())


@pytest.mark.parametrize("name", DECODERS)
def test_every_token_is_turned_to_the_angle_in_the_plane_at_its_norm(name):
    model = zoo.build(name)
    inputs, vector = zoo.inputs(model, batch=3, tokens=7), random_direction(model)
    plain, direction = block_output(model, 1, inputs), vector.directions[1]
    for angle in (15.0, 90.0, 140.0):
        with rotate(model, vector, layer=1, angle=angle):
            turned = block_output(model, 1, inputs)
        torch.testing.assert_close(degrees(turned, direction), torch.full((3, 7), angle).double(), atol=0.02, rtol=0)
        torch.testing.assert_close(turned.norm(dim=-1), plain.norm(dim=-1))
        for before, after in zip(plain.flatten(0, 1), turned.flatten(0, 1)):  # in the plane, and on the same side
            plane = torch.stack([direction, before]).T
            found = torch.linalg.lstsq(plane, after[:, None]).solution
            torch.testing.assert_close((plane @ found)[:, 0], after, atol=1e-3, rtol=1e-3)
            assert found[1] > 0
    assert hooks(model) == 0


def test_the_ends_are_the_vector_and_its_opposite_and_in_the_middle_it_is_gone(model):
    inputs, vector = zoo.inputs(model, batch=2, tokens=5), random_direction(model)
    plain, unit = block_output(model, 1, inputs), vector.directions[1] / vector.directions[1].norm()
    for angle, sign in ((0, 1), (180, -1)):
        with rotate(model, vector, layer=1, angle=angle):
            edited = block_output(model, 1, inputs)
        torch.testing.assert_close(edited, sign * plain.norm(dim=-1, keepdim=True) * unit, atol=1e-4, rtol=1e-4)
    with rotate(model, vector, layer=1, angle=90):
        turned = block_output(model, 1, inputs)
    with ablate(model, vector, layer=1):
        ablated = block_output(model, 1, inputs)
    longer = plain.norm(dim=-1, keepdim=True) / ablated.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(turned, ablated * longer, atol=1e-4, rtol=1e-4)


def test_what_already_is_at_the_angle_stays_and_what_lies_along_the_vector_has_no_plane(model):
    inputs, vector = zoo.inputs(model, batch=2, tokens=5), random_direction(model)
    with rotate(model, vector, layer=1, angle=70):
        once = block_output(model, 1, inputs)
        with rotate(model, vector, layer=1, angle=70):
            twice = block_output(model, 1, inputs)
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=1e-5)
    with rotate(model, vector, layer=1, angle=0), rotate(model, vector, layer=1, angle=70):
        along = block_output(model, 1, inputs)
    torch.testing.assert_close(degrees(along, vector.directions[1]), torch.zeros(2, 5).double(), atol=0.05, rtol=0)


def test_a_rotation_leaves_other_positions_bit_identical_and_refuses_angles_that_are_none(model):
    inputs, vector = zoo.inputs(model, batch=2, tokens=5), random_direction(model)
    plain, chosen = block_output(model, 1, inputs), torch.tensor([[True, False, True, False, False]] * 2)
    with rotate(model, vector, layer=1, angle=20, positions=chosen):
        edited = block_output(model, 1, inputs)
    assert torch.equal((edited != plain).any(dim=-1), chosen)
    for angle in (-1, 181, math.nan):
        with pytest.raises(InputError, match=f"angle is {angle}: give degrees from the vector, 0 to 180"):
            with rotate(model, vector, layer=1, angle=angle):
                pass


def test_gradients_flow_through_a_rotation(model):
    inputs, vector = zoo.inputs(model, batch=1, tokens=4), random_direction(model)
    with rotate(model, vector, layer=1, angle=50, during="always"):
        model(**inputs).logits.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_the_coefficient_is_the_mean_of_the_nearest_states():
    states = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [0.0, -4.0]]) + 100  # the mean is taken away
    coefs = torch.tensor([1.0, 2.0, 4.0, 8.0])
    hidden = torch.tensor([[[103.0, 101.0], [99.0, 102.0]], [[100.0, 1.0], [90.0, 99.0]]])
    nearest = nearest_coef(states, coefs, k=1)(hidden)
    assert nearest.tolist() == [[1.0, 2.0], [8.0, 4.0]]
    assert nearest_coef(states, coefs, k=2)(hidden)[0].tolist() == [1.5, 3.0]
    assert nearest_coef(states, coefs, k=4)(hidden).tolist() == [[3.75] * 2] * 2
    for count, k in ((3, 1), (4, 5), (4, 0)):
        with pytest.raises(InputError, match=f"4 states, {count} coefs and k={k}"):
            nearest_coef(states, coefs[:count], k=k)


def test_each_token_is_steered_by_its_own_coefficient_and_those_with_none_stay(model):
    inputs, vector = zoo.inputs(model, batch=3, tokens=6), random_direction(model)
    plain = block_output(model, 1, inputs)
    rows, coefs = plain.flatten(0, 1), torch.arange(18.0) - 9  # each token is its own nearest state
    with steer_where(model, vector, layer=1, coef=nearest_coef(rows, coefs, k=1)):
        edited = block_output(model, 1, inputs)
    torch.testing.assert_close(edited, plain + coefs.view(3, 6, 1) * vector.directions[1])
    assert torch.equal(edited[1, 3], plain[1, 3])
    limit = float(vector.project(plain, layer=1).median())
    with steer_where(model, vector, layer=1, coef=nearest_coef(rows, coefs, k=1), when=lambda p: p > limit):
        both = block_output(model, 1, inputs)
    where = (vector.project(plain, layer=1) > limit)[..., None]
    assert torch.equal(both, torch.where(where, edited, plain))
    same = nearest_coef(rows, torch.full((18,), 2.0))
    with steer_where(model, vector, layer=1, coef=same), torch.no_grad():
        everywhere = model(**inputs).logits
    with steer(model, vector, layer=1, coef=2.0), torch.no_grad():
        torch.testing.assert_close(everywhere, model(**inputs).logits)


def test_conditions_that_say_nothing_are_refused(model):
    vector = random_direction(model)
    for given in ({"coef": 1.0}, {"coef": lambda hidden: hidden[..., 0], "watch": vector}):
        with pytest.raises(InputError, match="steer_where needs when=, a condition on the projection, or a function"):
            with steer_where(model, vector, layer=1, **given):
                pass
    with pytest.raises(InputError, match=r"coef= returned torch.float32 \[1, 4, 2\]: return a float32 for each"):
        with steer_where(model, vector, layer=1, coef=lambda hidden: hidden[..., :2]):
            model(**zoo.inputs(model, batch=1, tokens=4))
