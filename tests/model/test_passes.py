"""Prompts that begin alike are read once up to where they differ: the numbers are those of each row alone."""

import itertools
import random

import pytest
import torch
import zoo
from helpers import DECODERS, random_direction
from torch.testing import assert_close

from persona_vectors.evaluation.logprobs import answer_logprobs, next_token_logprobs
from persona_vectors.model import passes
from persona_vectors.model.passes import Row, alike, cache_argument, forward_passes
from persona_vectors.model.pooling import POOLINGS, pool
from persona_vectors.steering.add import RowEdit, steer

START = list(range(5, 25))
ROWS: list[Row] = [
    ([*START, 30, 31], [40, 41]),
    ([9, 8], [42]),
    ([*START, 32, 33, 34, 35], [43, 44, 45]),
    (START, [46, 47]),
    ([*START, 36], [48]),
]


def saved(chosen: list[tuple[int, list[int]]]) -> int:
    return sum(length * (len(rows) - 1) for length, rows in chosen)


def divisions(rows: list[int]):
    """All the ways to divide rows into groups."""
    if not rows:
        yield []
        return
    for rest in divisions(rows[1:]):
        yield [[rows[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [rows[0], *rest[i]], *rest[i + 1 :]]


@pytest.mark.parametrize("seed", range(30))
def test_no_other_division_of_some_prompts_saves_more(monkeypatch, seed: int):
    monkeypatch.setattr(passes, "WORTH", 2)
    draw = random.Random(seed)
    prompts = [tuple(draw.choices((5, 6), k=draw.randint(0, 6))) for _ in range(6)]
    chosen = alike(prompts)

    def length(group: list[int]) -> int:
        rows = [prompts[i] for i in group]
        if len({*rows}) == 1:
            return len(rows[0])
        begun = sum(1 for _ in itertools.takewhile(lambda column: len({*column}) == 1, zip(*rows)))
        begun = min(begun, min(map(len, rows)) - 1)
        return begun if begun >= 2 else 0

    assert all(found == length(group) > 0 and len(group) > 1 for found, group in chosen)
    best = max(sum(length(group) * (len(group) - 1) for group in each) for each in divisions(list(range(6))))
    assert saved(chosen) == best


def test_thousands_of_prompts_are_divided_at_once_however_they_nest():
    prompts = [tuple(range(5, 5 + i)) for i in range(1, 2001)]
    assert saved(alike(prompts)) == 1000 * 999


def read(model, rows: list[Row]) -> list[tuple[int, bool]]:
    """How many tokens each pass reads, and whether they are answers."""
    found = []
    for step in forward_passes(model, rows, held_back=1):
        model.get_decoder()(**step.inputs)
        found.append((int((step.position >= 0).sum()), step.answers))
    return found


def test_what_prompts_begin_with_is_read_once(model):
    length = len(START) - 2  # the last token of no prompt, nor what is held back
    rest = sum(len(prompt) + len(answer) - length for prompt, answer in ROWS if prompt != [9, 8])
    assert read(model, ROWS) == [(length, False), (rest, True), (3, True)]


def test_a_few_tokens_that_are_alike_are_not_worth_a_pass(model):
    rows = [([*START[: passes.WORTH - 1], i, 4], [40]) for i in range(30, 34)]
    assert [answers for _, answers in read(model, rows)] == [True]


@pytest.mark.parametrize("name", DECODERS)
def test_means_and_logprobs_are_those_of_each_row_alone(name: str):
    model = zoo.build(name)
    if cache_argument(model) is not None:
        assert not all(answers for _, answers in read(model, ROWS))
    found = pool(model, ROWS, poolings=POOLINGS)
    logprobs, after = answer_logprobs(model, ROWS), next_token_logprobs(model, ROWS)
    for i, row in enumerate(ROWS):
        alone = pool(model, [row], poolings=POOLINGS)
        assert_close(found.means[i], alone.means[0], rtol=1e-3, atol=1e-4)
        assert_close(found.norms[i], alone.norms[0], rtol=1e-3, atol=1e-4)
        assert_close(logprobs[i], answer_logprobs(model, [row])[0], rtol=1e-3, atol=1e-4)
        assert_close(after[i], next_token_logprobs(model, [row])[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
def test_edits_are_made_where_they_would_be_without(model, positions: str):
    vector = random_direction(model)
    with steer(model, vector, layer=1, coef=4.0, positions=positions):
        found = answer_logprobs(model, ROWS)
        alone = torch.cat([answer_logprobs(model, [row]) for row in ROWS])
    assert_close(found, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, answer_logprobs(model, ROWS), atol=1e-2)


def test_rows_that_are_edited_differently_share_nothing(model):
    vector = random_direction(model)
    edits = [RowEdit(vector, 1, 4.0) if i % 2 else None for i in range(len(ROWS))]
    found = answer_logprobs(model, ROWS, edits=edits)
    for i, row in enumerate(ROWS):
        assert_close(found[i], answer_logprobs(model, [row], edits=[edits[i]])[0], rtol=1e-4, atol=1e-5)
