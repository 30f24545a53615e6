import pytest
import torch
import zoo
from helpers import DECODERS, block_outputs, make_tokenizer
from torch import nn

from persona_vectors.model import reads
from persona_vectors.model.generation import generate_tokens, stop_tokens
from persona_vectors.model.passes import Row, cache_argument, forward_passes
from persona_vectors.model.pooling import POOLINGS, Pooled, pool, pool_while_generating
from persona_vectors.model.prompts import left_pad

# Three prompts, two of them shared; answers of unequal lengths.
A, B, C = [5, 6, 7], [8, 9, 10, 11, 12], [13, 14]
ROWS: list[Row] = [(A, [20, 21]), (B, [22]), (A, [23, 24, 25, 26]), (C, [27, 28, 29]), (B, [30, 31, 32, 33, 34])]


def reference(model: nn.Module, rows: list[Row]) -> Pooled:
    """The paper's procedure: one row at a time, whole, every token's hidden state kept."""
    means, norms = [], []
    for prompt, answer in rows:
        states, n = block_outputs(model, [*prompt, *answer]), len(prompt)
        pooled = {
            "response_mean": states[:, n:].mean(dim=1),
            "prompt_mean": states[:, :n].mean(dim=1),
            "prompt_last": states[:, n - 1],
        }
        means.append(torch.stack([pooled[name] for name in POOLINGS]))
        norms.append(states[:, n:].norm(dim=-1).mean(dim=1))
    return Pooled(torch.stack(means), torch.stack(norms))


def test_layers_count_blocks_and_hidden_states_count_from_the_embeddings(model):
    ids = [*A, 20, 21]
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    blocks = block_outputs(model, ids)
    torch.testing.assert_close(torch.stack(output.hidden_states[1:-1])[:, 0], blocks[:-1])
    torch.testing.assert_close(output.hidden_states[-1][0], model.model.norm(blocks[-1]))


@pytest.mark.parametrize("name", DECODERS)
def test_one_pass_equals_all_hidden_states_one_row_at_a_time(name: str):
    model = zoo.build(name)
    expected = reference(model, ROWS)
    for budget in (8, 1024):  # many small passes, and one
        found = pool(model, ROWS, poolings=POOLINGS, batch_tokens=budget)
        torch.testing.assert_close(found.means, expected.means, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(found.norms, expected.norms, rtol=2e-4, atol=2e-5)


def test_most_architectures_share_prefixes():
    shared = {name for name in DECODERS if cache_argument(zoo.build(name))}
    assert len(shared) >= 36
    assert not shared & {"mamba", "mamba2", "recurrent_gemma", "jamba", "bloom"}


def test_shared_prompts_are_read_once(model):
    passes = list_passes(model, ROWS, 1024)
    prompts = [step for step in passes if not step.answers]
    assert sum(int((step.position >= 0).sum()) for step in prompts) == len(A) + len(B)
    answers = sum(int((step.position >= 0).sum()) for step in passes if step.answers)
    assert answers == sum(len(answer) for _, answer in ROWS) + len(C)  # no other row has this prompt


def list_passes(model: nn.Module, rows: list[Row], budget: int):
    passes = []
    for step in forward_passes(model, rows, batch_tokens=budget):
        model.get_decoder()(**step.inputs)
        passes.append(step)
    return passes


def test_an_empty_answer_leaves_the_prompt_s_means(model):
    found = pool(model, [(A, [20]), (A, []), (B, [21])], poolings=["prompt_mean"])
    torch.testing.assert_close(found.means[1], found.means[0])


def test_rows_that_share_no_prompt_are_read_whole_in_full_batches(model):
    rows = [(list(range(5, 9 + i)), [20] * (i + 1)) for i in range(6)]
    assert [len(step.rows) for step in list_passes(model, rows, 1024)] == [6]


def test_order_and_padding_are_irrelevant(model):
    forward, backward = (pool(model, rows, poolings=POOLINGS) for rows in (ROWS, ROWS[::-1]))
    torch.testing.assert_close(forward.means, backward.means.flip(0))


def test_bf16_models_are_averaged_in_float32():
    model = zoo.build("llama", torch.bfloat16)
    row: Row = (A, [20 + i % 200 for i in range(100)])
    found = pool(model, [row], poolings=["response_mean"])
    assert found.means.dtype == torch.float32
    torch.testing.assert_close(found.means[0, 0], block_outputs(model, [*row[0], *row[1]])[:, len(A) :].mean(dim=1))


@pytest.mark.parametrize("name", DECODERS)
def test_reading_while_generating_equals_the_second_pass(name: str):
    model, tokenizer = zoo.build(name), make_tokenizer()
    prompts, kept = [A, B, C, A], 6
    for seed in range(500):  # until some answer ends before the limit and some does not
        with pool_while_generating(model, stops=stop_tokens(model, tokenizer), poolings=POOLINGS) as pooled:
            answers = generate_tokens(model, tokenizer, prompts, max_new_tokens=kept + 1, seed=seed)
        rows = [(prompt, ids[:kept]) for prompt, (ids, _) in zip(prompts, answers)]
        if {len(ids) < kept for _, ids in rows} == {True, False} and all(ids for _, ids in rows):
            break
    else:
        pytest.fail("no seed gave answers of both kinds")
    found, expected = pooled(), pool(model, rows, poolings=POOLINGS)
    torch.testing.assert_close(found.means, expected.means, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(found.norms, expected.norms, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("together", [1, 3, reads.STEPS])
def test_steps_are_summed_together_with_the_same_means(model, tokenizer, monkeypatch, together: int):
    """Of answers of two lengths, of which the steps' outputs wait for one another, or do not."""
    prompts, stops = [A, B], stop_tokens(model, tokenizer)
    monkeypatch.setattr(reads, "STEPS", together)
    with pool_while_generating(model, stops=stops, poolings=POOLINGS) as pooled:
        answers = generate_tokens(model, tokenizer, prompts, max_new_tokens=71, seed=3)
    rows = [(prompt, ids[:70]) for prompt, (ids, _) in zip(prompts, answers)]
    assert max(len(ids) for _, ids in rows) > 2 * reads.STEPS
    found, expected = pooled(), pool(model, rows, poolings=POOLINGS)
    torch.testing.assert_close(found.means, expected.means, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(found.norms, expected.norms, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(pooled().means, found.means, rtol=0, atol=0)  # as often as one likes


def test_padding_is_in_no_mean_with_a_static_cache(model):
    """There the mask has four dimensions, and the pass is given one wider than what it reads."""
    ids, mask = left_pad([[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]], 0, "cpu")
    found = []
    for cache in ({}, {"cache_implementation": "static"}):
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "disable_compile": True, **cache}
        with pool_while_generating(model, stops=[], poolings=POOLINGS) as pooled, torch.no_grad():
            model.generate(input_ids=ids, attention_mask=mask, **options)
        found.append(pooled())
    torch.testing.assert_close(found[0].means, found[1].means)
    torch.testing.assert_close(found[0].norms, found[1].norms)
