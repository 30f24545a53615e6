"""Prompts that rows share are read once: the answers, and what hooks see, are those of each row alone."""

from contextlib import ExitStack

import pytest
import torch
import zoo
from helpers import DECODERS, hooks, random_direction
from torch import Tensor

from persona_vectors.model.beginnings import Beginnings
from persona_vectors.model.generation import generate_tokens, stop_tokens
from persona_vectors.model.pooling import POOLINGS, pool_while_generating
from persona_vectors.model.prefill import shared_prompts
from persona_vectors.model.sampling import row_seed
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import steer

A, B = [5, 6, 7], [8, 9, 10, 11, 12]
PROMPTS = [A, B, A, B, [13], A]
START = list(range(20, 40))
BEGUN = [[*START, 5, 6], [*START, 5, 6], [9, *A], [*START, 7, 8, 9, 10], START, [*START, 11]]
SEEDS = [row_seed(1, i) for i in range(len(PROMPTS))]
COEFS = [0.0, 3.0, 3.0, -4.0, 2.0, 9.0]


def answer(model, tokenizer, prompts, rows: list[int], coefs) -> tuple[list, list[Tensor], list[Tensor]]:
    """Answers of some rows in one batch, each one's projections from its first real token on, and its means."""
    options = {"max_new_tokens": 6, "seed": [SEEDS[i] for i in rows], "reading": True}
    with ExitStack() as stack:
        if coefs:
            stack.enter_context(steer(model, random_direction(model), layer=1, coef=torch.tensor(coefs)))
        stops = stop_tokens(model, tokenizer)
        pooled = stack.enter_context(pool_while_generating(model, stops=stops, poolings=POOLINGS))
        trace = stack.enter_context(monitor(model, random_direction(model), layer="all"))
        answers = generate_tokens(model, tokenizer, [prompts[i] for i in rows], **options)
    assert len(trace.calls) == 1
    values = torch.stack([trace[key] for key in trace.keys])
    width = max(len(prompts[i]) for i in rows)
    spans = [(width - len(prompts[i]), width + len(ids)) for i, (ids, _) in zip(rows, answers)]
    return answers, [values[:, line, slice(*span)] for line, span in enumerate(spans)], list(pooled().means)


@pytest.mark.parametrize("coefs", [None, COEFS], ids=["plain", "steered by row"])
@pytest.mark.parametrize("prompts", [PROMPTS, BEGUN], ids=["the same", "begun alike"])
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "recurrent_gemma"])  # which reads padding
def test_rows_that_share_their_prompts_answer_as_each_alone(name: str, prompts, coefs, tokenizer):
    model = zoo.build(name)
    answers, read, means = answer(model, tokenizer, prompts, [0, 1, 2, 3, 4, 5], coefs)
    for i in range(len(prompts)):
        alone = answer(model, tokenizer, prompts, [i], coefs and [coefs[i]])
        assert [answers[i]] == alone[0]
        torch.testing.assert_close(read[i], alone[1][0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(means[i], alone[2][0], rtol=1e-3, atol=1e-4)
    assert hooks(model) == 0


@pytest.mark.parametrize("prompts", [PROMPTS, BEGUN], ids=["the same", "begun alike"])
def test_without_a_cache_the_answers_are_the_same(model, tokenizer, prompts):
    options = {"max_new_tokens": 6, "temperature": 0.0}
    with steer(model, random_direction(model), layer=1, coef=torch.tensor(COEFS)):
        kept, none = [generate_tokens(model, tokenizer, prompts, **options, use_cache=way) for way in (True, False)]
    assert kept == none
    assert hooks(model) == 0


@pytest.mark.parametrize(("coef", "last"), [(5.0, 3), (torch.tensor(COEFS), 6)], ids=["alike", "by row"])
def test_each_distinct_prompt_is_read_once_up_to_where_rows_differ(model, tokenizer, coef: float | Tensor, last: int):
    rows: list[list[int]] = [[] for _ in range(zoo.BLOCKS)]
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda _, args, index=index: rows[index].append(len(args[0])))
    with steer(model, random_direction(model), layer=1, coef=coef):
        generate_tokens(model, tokenizer, PROMPTS, max_new_tokens=3, temperature=0)
    assert [seen[0] for seen in rows] == [3, 3, last]
    assert all(set(seen[1:]) == {6} for seen in rows)


def test_a_compiled_model_which_hooks_would_compile_anew_for_each_batch_gets_none(model):
    with shared_prompts(model, PROMPTS):
        assert hooks(model) > 0
    model.compile(backend="eager")
    with shared_prompts(model, PROMPTS):
        assert hooks(model) == 0


def test_nothing_is_left_of_it_after_an_error(model, tokenizer):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate_tokens(model, tokenizer, PROMPTS, max_new_tokens=3)
    handle.remove()
    assert hooks(model) == 0


@pytest.mark.parametrize(("coef", "apart"), [(5.0, [True] * 3), (torch.tensor(COEFS), [True, True, False])])
def test_what_prompts_begin_with_is_read_once_up_to_where_rows_differ(model, tokenizer, coef, apart: list[bool]):
    read: list[list[int]] = [[] for _ in range(zoo.BLOCKS)]
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda _, args, index=index: read[index].append(args[0].shape[:2].numel()))
    with steer(model, random_direction(model), layer=1, coef=coef):
        generate_tokens(model, tokenizer, BEGUN, max_new_tokens=1, temperature=0)
    width, length, distinct = max(map(len, BEGUN)), len(START) - 1, len(BEGUN) - 1
    lines = [2 * length, distinct * (width - length)]  # the beginning, and that of the prompt that is alone
    assert read == [lines if divided else [len(BEGUN) * width] for divided in apart]


def test_a_batch_that_would_hardly_be_smaller_is_read_whole():
    assert Beginnings([tuple(prompt) for prompt in BEGUN]).shared
    assert not Beginnings([(*START, *[i] * 100) for i in range(5, 8)]).shared
    assert not Beginnings([(*START[:10], i) for i in range(5, 8)]).shared


def test_a_block_that_gives_more_than_its_states_reads_all_tokens(model, tokenizer):
    """What it gives besides may be by row, by token or neither."""
    expected = generate_tokens(model, tokenizer, BEGUN, max_new_tokens=3, temperature=0)
    block, seen = model.model.layers[1], []
    own = block.forward
    block.forward = lambda *args, **kwargs: (own(*args, **kwargs), torch.zeros(3))
    block.register_forward_hook(lambda _block, _args, output: output[0])
    block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    assert generate_tokens(model, tokenizer, BEGUN, max_new_tokens=3, temperature=0) == expected
    assert max(map(len, BEGUN)) in seen
