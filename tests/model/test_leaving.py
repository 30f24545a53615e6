"""Rows that have ended leave the batch: the answers, and what hooks see of them, are those of all rows together."""

from contextlib import ExitStack

import pytest
import torch
import zoo
from helpers import DECODERS, hooks, random_direction
from torch import Tensor

from persona_vectors.model import leaving
from persona_vectors.model.generation import generate_tokens, stop_tokens
from persona_vectors.model.pooling import POOLINGS, pool_while_generating
from persona_vectors.model.sampling import row_seed
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import steer

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7], [13]] * 3
COEFS = [0.0, 3.0, -4.0] * 4
NEW = 10


def ends(model) -> None:
    """Have a fourth of the tokens end an answer."""
    model.generation_config.eos_token_id = list(range(0, zoo.VOCAB, 4))


def answer(model, tokenizer, coefs: list[float] | None) -> tuple[list, list[Tensor], Tensor]:
    with ExitStack() as stack:
        if coefs:
            stack.enter_context(steer(model, random_direction(model), layer=1, coef=torch.tensor(coefs)))
        pooled = stack.enter_context(
            pool_while_generating(model, stops=stop_tokens(model, tokenizer), poolings=POOLINGS)
        )
        trace = stack.enter_context(monitor(model, random_direction(model), layer="all"))
        seeds = [row_seed(2, i) for i in range(len(PROMPTS))]
        answers = generate_tokens(model, tokenizer, PROMPTS, max_new_tokens=NEW, seed=seeds, reading=True)
    values = torch.stack([trace[key] for key in trace.keys])
    width = max(map(len, PROMPTS))
    spans = [(width - len(prompt), width + len(ids)) for prompt, (ids, _) in zip(PROMPTS, answers)]
    return answers, [values[:, line, slice(*span)] for line, span in enumerate(spans)], pooled().means


@pytest.mark.parametrize("coefs", [None, COEFS], ids=["plain", "steered by row"])
@pytest.mark.parametrize("name", DECODERS)
def test_answers_and_what_is_read_of_them_are_those_of_all_rows(name, coefs, tokenizer, monkeypatch):
    model = zoo.build(name)
    ends(model)
    found, read, means = answer(model, tokenizer, coefs)
    monkeypatch.setattr(leaving, "can_take_rows", lambda _: False)
    wanted, whole, own = answer(model, tokenizer, coefs)
    assert found == wanted and len({len(ids) for ids, _ in found}) > 2
    for one, other in zip(read, whole):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(means, own, rtol=1e-3, atol=1e-4)
    assert hooks(model) == 0


def test_blocks_and_head_read_only_the_rows_that_are_left(model, tokenizer):
    ends(model)
    seen: dict[str, list[int]] = {"block": [], "head": []}
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: seen["block"].append(len(args[0])))
    model.lm_head.register_forward_hook(lambda _, args, __: seen["head"].append(len(args[0])))
    answers = generate_tokens(model, tokenizer, PROMPTS, max_new_tokens=NEW, seed=3)
    lengths = [len(ids) + ended for ids, ended in answers]
    rows, wanted = len(PROMPTS), []
    for step in range(1, max(lengths)):  # what a pass after the first may read: half leaves at a time
        alive = sum(length > step for length in lengths)
        rows = alive if alive <= rows // 2 else rows
        wanted.append(rows)
    assert seen["block"][1:] == wanted and seen["head"][1:] == wanted
    assert min(wanted) < len(PROMPTS) // 2


def test_nothing_is_left_of_it_after_an_error(model, tokenizer):
    ends(model)
    calls: list[int] = []

    def fail(_module: object, args: tuple[Tensor, ...]) -> None:
        calls.append(len(args[0]))
        if calls[-1] < len(PROMPTS) and len(calls) > 1:
            raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate_tokens(model, tokenizer, PROMPTS, max_new_tokens=NEW, seed=3)
    handle.remove()
    assert hooks(model) == 0
