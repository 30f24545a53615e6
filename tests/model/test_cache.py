"""A cache that is written in place holds, and gives, what the library's own does."""

from contextlib import nullcontext

import pytest
import torch
import zoo
from helpers import DECODERS, hooks
from transformers.cache_utils import DynamicLayer

from persona_vectors.model import generation
from persona_vectors.model.blocks import decoder_layers
from persona_vectors.model.cache import RoomyLayer, room_in_cache
from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.prefill import can_take_rows

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7], [13]]
NEW = 9


def layers_after(model, tokenizer, seen: list) -> list:
    """Answer, and note which layers' cache each step of the last block was given."""

    def note(_block, args, kwargs) -> None:
        cache = next(each for each in (*args, *kwargs.values()) if hasattr(each, "layers"))
        seen.append((cache.layers[-1], cache.layers[-1].keys))

    handle = decoder_layers(model)[-1].register_forward_hook(lambda *given: note(*given[:3]), with_kwargs=True)
    try:
        return generate_tokens(model, tokenizer, PROMPTS, max_new_tokens=NEW, seed=4)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", DECODERS)
def test_the_same_answers_and_the_same_cache(name, tokenizer, monkeypatch):
    model, found, wanted = zoo.build(name), [], []
    if not can_take_rows(model):
        pytest.skip("its cache is left as it is")
    answers = layers_after(model, tokenizer, found)
    monkeypatch.setattr(generation, "room_in_cache", lambda *_: nullcontext())
    assert answers == layers_after(model, tokenizer, wanted)
    assert len(found) == len(wanted) == NEW
    for (_, own), (_, other) in zip(found, wanted):
        assert torch.equal(own, other)
    kept = type(wanted[-1][0])
    assert type(found[-1][0]) is (RoomyLayer if kept is DynamicLayer else kept)
    assert hooks(model) == 0


def test_nothing_is_copied_after_the_first_step(model, tokenizer):
    seen: list = []
    layers_after(model, tokenizer, seen)
    assert len({keys.data_ptr() for _, keys in seen[1:]}) == 1
    assert seen[1][0].rooms["keys"][0].shape[-2] == seen[-1][1].shape[-2]  # room for the answers, and no more


def test_rows_that_leave_a_cut_and_more_tokens_than_were_expected():
    own, plain = DynamicLayer(), DynamicLayer()
    start = torch.randn(2, 4, 2, 3, 5)
    for layer in (own, plain):
        layer.update(*start)
    roomy = RoomyLayer(own, 6)

    def step(tokens: int) -> None:
        new = torch.randn(2, len(plain.keys), 2, tokens, 5)
        assert all(map(torch.equal, roomy.update(*new), plain.update(*new)))

    step(1)
    before = roomy.keys
    kept = before.clone()
    step(1)
    assert torch.equal(before, kept)  # what was given out stays as it was
    for layer in (roomy, plain):
        layer.batch_select_indices(torch.tensor([2, 0]))
    step(1)
    for layer in (roomy, plain):
        layer.crop(-2)
    step(1)
    step(4)  # one more than there is room for
    step(1)
    assert roomy.get_seq_length() == 10


def test_a_call_that_ends_with_its_prompt_leaves_no_hook(model, tokenizer):
    with room_in_cache(model, 8):
        generate_tokens(model, tokenizer, PROMPTS, max_new_tokens=1)
    assert hooks(model) == 0
