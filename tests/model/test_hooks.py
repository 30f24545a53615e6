import gc

import pytest
import torch
import zoo
from helpers import block_output, hooks, random_direction
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import decoder_layers
from persona_vectors.model.hooks import edit_blocks, pause_edits
from persona_vectors.model.prompts import left_pad
from persona_vectors.model.tokens import Tokens
from persona_vectors.steering.add import steer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_the_shift_at_the_block_is_exact_and_all_is_restored(name: str, dtype: torch.dtype):
    model = zoo.build(name, dtype)
    inputs, vector, layer = zoo.inputs(model), random_direction(model), 1
    plain = block_output(model, layer, inputs)
    with torch.no_grad():
        before = model(**inputs).logits
    with steer(model, vector, layer=layer, coef=3.0):
        steered = block_output(model, layer, inputs)
    expected = plain + (3.0 * vector.directions[layer]).to(plain.dtype)
    torch.testing.assert_close(steered, expected, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError), steer(model, vector, layer=layer, coef=3.0):
        raise ZeroDivisionError
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral", "llava", "qwen2_vl"])
def test_a_lora_wrapped_model_is_steered_the_same(name: str):
    model = zoo.build(name)
    inputs, vector = zoo.inputs(model), random_direction(model)
    plain = block_output(model, 1, inputs)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with steer(wrapped, vector, layer=1, coef=2.0):
        steered = block_output(wrapped, 1, inputs)
    torch.testing.assert_close(steered, plain + 2.0 * vector.directions[1], rtol=0, atol=0)
    assert hooks(wrapped) == 0


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_the_decoder_blocks_are_found(name: str):
    model = zoo.build(name)
    blocks = decoder_layers(model)
    assert len(blocks) == zoo.BLOCKS
    fired = set()
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=index: fired.add(i) and None)
    model(**zoo.inputs(model))
    assert fired == {0, 1, 2}


def test_a_bad_layer_leaves_no_hook(model):
    with pytest.raises(InputError, match="layer 3 is out of range: this model has layers 0 to 2"):
        with edit_blocks(model, {0: lambda h, _: None, 3: lambda h, _: None}):
            pass
    assert hooks(model) == 0


def test_it_raises_where_the_block_never_ran(model):
    with pytest.raises(RuntimeError, match="block 1 never ran"):
        with edit_blocks(model, {1: lambda h, _: None}):
            pass
    assert hooks(model) == 0


def test_an_error_in_an_edit_leaves_no_hook(model):
    def broken(hidden: Tensor, tokens: Tokens) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError), edit_blocks(model, {1: broken}):
        model(**zoo.inputs(model))
    assert hooks(model) == 0


def test_paused_edits_do_nothing_and_new_ones_inside_do(model):
    inputs, vector = zoo.inputs(model), random_direction(model)
    plain = block_output(model, 1, inputs)
    with steer(model, vector, layer=1, coef=1.0):
        with pause_edits(model):
            torch.testing.assert_close(block_output(model, 1, inputs), plain)
            with steer(model, vector, layer=1, coef=2.0):
                inside = block_output(model, 1, inputs)
        outside = block_output(model, 1, inputs)
    torch.testing.assert_close(inside, plain + 2 * vector.directions[1])
    torch.testing.assert_close(outside, plain + vector.directions[1])


def test_the_cache_of_a_generation_is_not_kept_alive(model):
    with edit_blocks(model, {0: lambda h, _: None}) as tokens:
        model.generate(**zoo.inputs(model), max_new_tokens=3, pad_token_id=0)
        gc.collect()
        assert tokens._cache() is None


def record(model: nn.Module, ids: Tensor, mask: Tensor, use_cache: bool) -> list[dict[str, list]]:
    """Generate three tokens and return, for each forward pass, where each position name applies."""
    passes: list[dict[str, list]] = []

    def edit(hidden: Tensor, tokens: Tokens) -> None:
        everything = torch.ones(hidden.shape[:2], dtype=torch.bool)
        found = {name: tokens.select(name) for name in ("all", "prompt", "response")}
        passes.append({name: (everything if m is None else m).int().tolist() for name, m in found.items()})

    with edit_blocks(model, {0: edit}):
        model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, use_cache=use_cache, pad_token_id=0
        )
    return passes


@pytest.mark.parametrize("name", [n for n in zoo.ARCHITECTURES if n not in ("t5", "bart", "t5gemma")])
def test_positions_are_known_with_and_without_cache(name: str):
    model = zoo.build(name)
    ids, mask = left_pad([[5, 6, 7], [8, 9, 10, 11]], 0, "cpu")
    first = {
        "all": [[0, 1, 1, 1], [1, 1, 1, 1]],
        "prompt": [[0, 1, 1, 1], [1, 1, 1, 1]],
        "response": [[0, 0, 0, 1], [0, 0, 0, 1]],
    }
    cached = record(model, ids, mask, True)
    assert cached[0] == first
    assert cached[1] == cached[2] == {"all": [[1], [1]], "prompt": [[0], [0]], "response": [[1], [1]]}
    uncached = record(model, ids, mask, False)
    assert uncached[0] == first
    assert uncached[2] == {name: [row + [int(name != "prompt")] * 2 for row in rows] for name, rows in first.items()}


def test_generation_that_bypasses_the_decoder_is_an_error(model):
    """As other libraries' fast decoding does; the function that was set on the model is there again afterwards."""
    own = model.generate

    def fast(input_ids: Tensor, **options: int) -> Tensor:
        first = own(input_ids=input_ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
        return torch.cat([first, first[:, -1:].expand(-1, 3)], dim=1)

    model.generate = fast
    with pytest.raises(RuntimeError, match="rows of 9 tokens, of which only 5 went through the hooked decoder"):
        with steer(model, random_direction(model), layer=1, coef=1.0):
            model.generate(**zoo.inputs(model))
    assert model.generate is fast and hooks(model) == 0


def test_a_pass_without_a_block_is_an_error_also_in_generation(model):
    """A hook counts as fired in each pass: here the block is left out once the prompt was read."""
    decoder = model.model
    forward, every = decoder.forward, decoder.layers

    def skipping(*args, **kwargs):
        ids = kwargs.get("input_ids")
        decoder.layers = every if ids.shape[1] == 5 else nn.ModuleList([every[0], every[2]])
        try:
            return forward(*args, **kwargs)
        finally:
            decoder.layers = every

    decoder.forward = skipping
    with pytest.raises(RuntimeError, match="block 1 never ran in this forward pass"):
        with steer(model, random_direction(model), layer=1, coef=1.0):
            model.generate(**zoo.inputs(model), max_new_tokens=4, min_new_tokens=4, pad_token_id=0, use_cache=False)
