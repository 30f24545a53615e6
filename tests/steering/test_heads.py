import pytest
import torch
import zoo
from helpers import hooks

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import decoder_layers
from persona_vectors.steering.heads import head_projections, head_states, shift_heads

ROWS = [([5, 6, 7, 8], [9, 10]), ([5, 6, 7, 8], [11]), ([12, 13], [14, 15, 16])]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def planted_shifts(model):
    shifts = torch.zeros(zoo.BLOCKS, 4, head_projections(model)[0].in_features // 4)
    shifts[0, 1], shifts[2, 3] = 3.0, torch.linspace(-2, 2, shifts.shape[2])
    return shifts


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "opt", "phi"])
def test_baked_biases_are_what_a_hook_on_the_heads_does_and_are_gone_afterwards(name):
    model = zoo.build(name)
    shifts, before = planted_shifts(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with shift_heads(model, shifts):
            baked = model(input_ids=IDS).logits
            assert hooks(model) == 0
        handles = [
            module.register_forward_pre_hook(lambda _, given, shift=shift: (given[0] + shift.flatten(),))
            for module, shift in zip(head_projections(model), shifts)
        ]
        hooked = model(input_ids=IDS).logits
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(model(input_ids=IDS).logits, plain, atol=0, rtol=0)
    torch.testing.assert_close(baked, hooked, atol=1e-5, rtol=1e-5)
    assert float((baked - plain).abs().max()) > 1e-3
    assert model.state_dict().keys() == before.keys()


def test_the_biases_are_restored_after_an_error(model):
    before = [module.bias for module in head_projections(model)]
    with pytest.raises(RuntimeError, match="stop"), shift_heads(model, planted_shifts(model)):
        raise RuntimeError("stop")
    assert [module.bias for module in head_projections(model)] == before


def test_states_are_each_head_s_part_of_what_attention_adds_at_the_last_token(model):
    found = head_states(model, ROWS)
    assert found.shape == (3, zoo.BLOCKS, 4, zoo.HIDDEN // 4) and hooks(model) == 0
    added: list[torch.Tensor] = []

    def keep(_module, _args, out):
        added.append(out[0][0, -1])

    for block in decoder_layers(model):
        block.self_attn.register_forward_hook(keep)
    for prompt, answer in ROWS:
        with torch.no_grad():
            model(input_ids=torch.tensor([[*prompt, *answer]]))
    made = [m(each.flatten()) for states in found for m, each in zip(head_projections(model), states)]
    torch.testing.assert_close(torch.stack(made), torch.stack(added), atol=1e-5, rtol=1e-5)


def test_a_model_without_such_heads_is_refused():
    with pytest.raises(InputError, match="block 0 has no attention that ends in a linear layer"):
        head_projections(zoo.build("mamba"))
