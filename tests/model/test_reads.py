"""Blocks that are read together give what each gives alone."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
import zoo
from helpers import generate, hooks
from torch import Tensor, nn

from persona_vectors.model import reads
from persona_vectors.model.blocks import decoder_layers
from persona_vectors.model.hooks import edit_blocks, pause_edits
from persona_vectors.model.reads import read_blocks
from persona_vectors.model.tokens import Tokens

LAYERS = [0, 1, 2]


@contextmanager
def read_both_ways(model: nn.Module):
    """Yield, for each pass and layer, the output that is read at once and the one read with others; and the groups."""
    alone: list[Tensor] = []
    together: list[Tensor] = []
    groups: list[list[int]] = []

    def read(layers: list[int], states: Tensor, tokens: Tokens) -> None:
        groups.append(list(layers))
        together.extend(states.clone())

    def own(hidden: Tensor, tokens: Tokens) -> None:
        alone.append(hidden.clone())

    with edit_blocks(model, dict.fromkeys(LAYERS, own)), read_blocks(model, LAYERS, read):
        yield alone, together, groups


def assert_equal(alone: list[Tensor], together: list[Tensor]) -> None:
    assert len(alone) == len(together) > 0
    for one, other in zip(alone, together):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba", "t5"])
def test_a_decoding_step_gives_all_blocks_at_once_and_a_prompt_each_as_it_comes(name: str):
    model = zoo.build(name)
    with read_both_ways(model) as (alone, together, groups):
        model.generate(**{k: v for k, v in zoo.inputs(model).items() if k != "decoder_input_ids"}, max_new_tokens=4,
                       min_new_tokens=4, do_sample=False, pad_token_id=0)  # fmt: skip
    assert_equal(alone, together)
    assert groups[-1] == LAYERS
    assert name == "t5" or groups[:3] == [[0], [1], [2]]


def test_outputs_wait_for_one_another_only_where_they_are_small(model, monkeypatch):
    monkeypatch.setattr(reads, "SMALL", 1.5 * model.config.hidden_size)
    with read_both_ways(model) as (alone, together, groups):
        generate(model, [[5, 6]], max_new_tokens=3, min_new_tokens=3)
    assert_equal(alone, together)
    assert groups[3:] == [[0, 1], [2]] * 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_changed_in_place_afterwards_is_read_as_it_was(model, mode):
    handle = decoder_layers(model)[2].register_forward_pre_hook(lambda _, args: (args[0].add_(1.0), None)[1])
    with read_both_ways(model) as (alone, together, groups), mode():
        generate(model, max_new_tokens=4, min_new_tokens=4)
    handle.remove()
    assert_equal(alone, together)
    assert groups[-1] == LAYERS


def test_a_pass_with_gradients_keeps_nothing_back(model):
    with read_both_ways(model) as (alone, together, groups):
        model(input_ids=torch.tensor([[5], [6]]))
    assert_equal(alone, together)
    assert groups == [[0], [1], [2]]


def test_a_pass_that_failed_leaves_nothing_to_the_next(model):
    def fail(hidden: Tensor, tokens: Tokens) -> None:
        raise KeyError

    with read_both_ways(model) as (alone, together, groups), torch.no_grad():
        with pytest.raises(KeyError), edit_blocks(model, {1: fail}):
            model(input_ids=torch.tensor([[5]]))
        alone.clear()
        model(input_ids=torch.tensor([[6]]))
    assert_equal(alone, together)
    assert groups == [LAYERS]


@pytest.mark.parametrize("name", ["llama", "bloom"])  # whose blocks return tensors, and tuples
def test_steps_are_read_around_edits_of_some_blocks_and_pauses(name: str):
    """A step's outputs are kept without a call where nothing else is done, and in the middle of that others act."""
    model = zoo.build(name)
    seen: list[tuple[list[int], Tensor]] = []
    plain: list[Tensor] = []

    def read(layers: list[int], states: Tensor, tokens: Tokens) -> None:
        seen.append((layers, states.clone()))

    def judge(hidden: Tensor, tokens: Tokens) -> Tensor:
        with pause_edits(model):
            model(input_ids=torch.tensor([[9], [9]]))  # a judge's pass, which nobody reads
        return hidden + 1.0

    def tensor(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    with torch.no_grad(), read_blocks(model, LAYERS, read), edit_blocks(model, {1: judge}):
        handles = [b.register_forward_hook(lambda _m, a, o: plain.append(tensor(o))) for b in decoder_layers(model)]
        for token in (5, 6, 7):
            model(input_ids=torch.tensor([[token], [token]]))
        [handle.remove() for handle in handles]
    assert [layers for layers, _ in seen] == [LAYERS] * 3
    for (_, states), at in zip(seen, (0, 6, 12)):  # block 0; the judge's three; block 1 edited; block 2
        torch.testing.assert_close(states[0], plain[at], rtol=0, atol=0)
        torch.testing.assert_close(states[1], plain[at + 4] - 1.0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(states[2], plain[at + 5], rtol=0, atol=0)
    assert hooks(model) == 0 and len(plain) == 18


def test_a_block_that_a_step_leaves_out_is_named(model, monkeypatch):
    layers = decoder_layers(model)
    with torch.no_grad(), read_blocks(model, LAYERS, lambda *_: None):
        for _ in range(2):
            model(input_ids=torch.tensor([[5]]))
        whole = list(layers)
        monkeypatch.setattr(type(layers), "__getitem__", lambda self, i: [whole[0], whole[2]])
        with pytest.raises(RuntimeError, match="block 1 never ran in this forward pass"):
            model(input_ids=torch.tensor([[5]]))
