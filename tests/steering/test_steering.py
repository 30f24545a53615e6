import pytest
import torch
import zoo
from helpers import block_output, hooks, logits_while_generating, random_direction

from persona_vectors.data.errors import InputError
from persona_vectors.model.prompts import left_pad
from persona_vectors.steering.add import steer
from persona_vectors.vectors.vector import PersonaVector


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma3", "mamba", "qwen2_vl", "qwen3_next"])
def test_the_cache_and_the_rest_of_the_batch_change_nothing(name: str, positions: str):
    model = zoo.build(name)
    vector = random_direction(model)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    ids, mask = left_pad(prompts, 0, "cpu")
    with steer(model, vector, layer=1, coef=4.0, positions=positions):
        cached = logits_while_generating(model, ids, mask, use_cache=True)
        uncached = logits_while_generating(model, ids, mask, use_cache=False)
        alone = [logits_while_generating(model, *left_pad([prompt], 0, "cpu")) for prompt in prompts]
    torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached, torch.cat(alone), rtol=1e-4, atol=1e-4)
    plain = logits_while_generating(model, ids, mask)
    assert (cached - plain).abs().max() > 1e-3


def test_nested_steers_add_up(model):
    inputs, vector = zoo.inputs(model), random_direction(model)
    plain = block_output(model, 1, inputs)
    with steer(model, vector, layer=1, coef=1.5), steer(model, vector, layer=1, coef=-4.0):
        both = block_output(model, 1, inputs)
    torch.testing.assert_close(both, plain - 2.5 * vector.directions[1])


def test_each_row_can_have_its_own_coefficient(model):
    inputs, vector = zoo.inputs(model), random_direction(model)
    plain = block_output(model, 1, inputs)
    with steer(model, vector, layer=1, coef=torch.tensor([0.0, 2.0])):
        steered = block_output(model, 1, inputs)
    torch.testing.assert_close(steered[0], plain[0], rtol=0, atol=0)
    torch.testing.assert_close(steered[1], plain[1] + 2 * vector.directions[1])


def test_a_dose_is_a_fraction_of_the_residual_norm(model):
    inputs, directions = zoo.inputs(model), random_direction(model).directions
    vector = PersonaVector(trait="t", model="m", directions=directions, residual_norms=torch.tensor([1.0, 20.0, 3.0]))
    plain = block_output(model, 1, inputs)
    with steer(model, vector, layer=1, dose=0.25):
        shift = block_output(model, 1, inputs) - plain
    torch.testing.assert_close(shift.norm(dim=-1), torch.full((2, 5), 5.0))


def test_several_layers_get_incremental_vectors(model):
    """With blocks that pass their input on, the stream after block k holds coef * v_k, counted once."""
    for block in model.model.layers:
        for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            weight.data.zero_()
    inputs, vector = zoo.inputs(model), random_direction(model)
    plain = block_output(model, 2, inputs)
    for layers in ("all", [0, 2], [2]):
        with steer(model, vector, layer=layers, coef=2.0):
            steered = block_output(model, 2, inputs)
        torch.testing.assert_close(steered, plain + 2 * vector.directions[2])


def test_a_mask_chooses_tokens_and_padding_is_never_edited(model):
    vector = random_direction(model)
    ids, attention = left_pad([[5, 6], [7, 8, 9]], 0, "cpu")
    inputs = {"input_ids": ids, "attention_mask": attention}
    plain = block_output(model, 1, inputs)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    with steer(model, vector, layer=1, coef=1.0, positions=mask):
        shift = block_output(model, 1, inputs) - plain
    moved = shift.abs().sum(dim=-1) > 0
    assert moved.tolist() == [[False, True, False], [False, True, True]]
    with pytest.raises(InputError, match=r"mask is \[2, 3\] but the forward pass reads \[1, 3\]"):
        with steer(model, vector, layer=1, coef=1.0, positions=mask):
            model(input_ids=ids[:1])


def test_gradients_flow_through_the_edit_and_the_input_is_not_changed(model):
    vector = random_direction(model)
    with steer(model, vector, layer=1, coef=1.0):
        model(**zoo.inputs(model)).logits.sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 9, "coef": 1.0}, "layer 9 is out of range"),
        ({"layer": "last", "coef": 1.0}, "give a number, several numbers, or 'all'"),
        ({"layer": 1}, "give either coef="),
        ({"layer": 1, "coef": 1.0, "dose": 1.0}, "give either coef="),
        ({"layer": 1, "dose": 1.0}, "does not know the residual norms"),
        ({"layer": 1, "coef": 1.0, "positions": "answer"}, "give one of all, prompt, response"),
    ],
)
def test_bad_options_say_what_is_allowed(model, options: dict, message: str):
    with pytest.raises(InputError, match=message), steer(model, random_direction(model), **options):
        pass
    assert hooks(model) == 0


def test_a_vector_of_another_size_does_not_fit(model):
    vector = PersonaVector(trait="t", model="other", directions=torch.ones(3, 16))
    with pytest.raises(InputError, match="does not fit a model of 3 layers x 32"):
        with steer(model, vector, layer=1, coef=1.0):
            pass
