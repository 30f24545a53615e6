"""Rows of persona evals and A/B files as statements: both answers, both orders, no liking for a letter."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import plain_logprob, random_direction

from persona_vectors.data.errors import InputError
from persona_vectors.data.packed import open_data
from persona_vectors.evaluation.check import require_valid_judge
from persona_vectors.evaluation.contrast import contrast_effect
from persona_vectors.evaluation.likelihood import Statements, likelihood_contrast, load_statements
from persona_vectors.model.prompts import chat_prompt, encode

ROOT = Path(__file__).parents[2]


def say(text: str, answer: str, confidence: float = 0.9) -> dict:
    other = {" Yes": " No", " No": " Yes"}[answer]
    question = f'Is the following statement something you would say?\n"{text}"'
    row = {"question": question, "statement": text, "label_confidence": confidence}
    return row | {"answer_matching_behavior": answer, "answer_not_matching_behavior": other}


def choose(ask: str, a: str, b: str, answer: str) -> dict:
    other = {"(A)": "(B)", "(B)": "(A)"}[answer]
    question = f"{ask}\n\nChoices:\n (A) {a}\n (B) {b}"
    return {"question": question, "answer_matching_behavior": answer, "answer_not_matching_behavior": other}


TIDY = [
    say("I leave things lying about", " No", 0.8),
    say("I fold my socks", " Yes", 0.7),
    say("I sort my books", " Yes", 0.95),
    say("I never dust", " No", 0.99),
    say("I label my jars", " Yes", 0.6),
]
TEA = [
    choose("What would you drink?", "Tea, please.", "Coffee, please.", "(A)"),
    choose("And in the evening (late)?", "A coffee\nwith milk", "Tea", "(B)"),
]


def file(path: Path, rows: list[dict]) -> Path:
    listed = path.name.startswith("ab")
    with open_data(path, "wb") as out:
        out.write((json.dumps(rows) if listed else "\n".join(map(json.dumps, rows))).encode())
    return path


def asked(statements: Statements) -> list[tuple[str, str, str]]:
    return [(q, pair.pos, pair.neg) for q, pair in zip(statements.questions, statements.pairs)]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "ab.json"])
def test_yes_and_no_show_the_behaviour_equally_often_the_surest_first(name: str, tmp_path):
    found = load_statements(file(tmp_path / name, TIDY))
    order = [(2, "Yes", "No"), (3, "No", "Yes"), (1, "Yes", "No"), (0, "No", "Yes")]
    assert asked(found) == [(TIDY[i]["question"], pos, neg) for i, pos, neg in order] and found.orders == 2
    assert asked(load_statements(tmp_path / name, first=1)) == asked(found)[:2]
    with pytest.raises(InputError, match="first is 0: give 1 pair or more"):
        load_statements(tmp_path / name, first=0)


@pytest.mark.parametrize("name", ["ab.json", "ab.json.zst", "d.jsonl"])
def test_choices_are_asked_in_both_orders(name: str, tmp_path):
    found = load_statements(file(tmp_path / name, TEA))
    begin = "What would you drink?\n\nChoices:\n "
    evening = "And in the evening (late)?\n\nChoices:\n "
    assert asked(found) == [
        (begin + "(A) Tea, please.\n (B) Coffee, please.", "(A)", "(B)"),
        (begin + "(A) Coffee, please.\n (B) Tea, please.", "(B)", "(A)"),
        (evening + "(A) A coffee\nwith milk\n (B) Tea", "(B)", "(A)"),
        (evening + "(A) Tea\n (B) A coffee\nwith milk", "(A)", "(B)"),
    ]


def by_hand(model, tokenizer, found: Statements) -> list[float]:
    sides = []
    for question, pos, neg in asked(found):
        prompt = encode(tokenizer, chat_prompt(tokenizer, question))
        sides.append([plain_logprob(model, prompt, encode(tokenizer, text)) for text in (pos, neg)])
    values = [pos - neg for pos, neg in sides]
    return [(first + second) / 2 for first, second in zip(values[::2], values[1::2])]


@pytest.mark.parametrize("rows", [TIDY, TEA], ids=["yes and no", "choices"])
def test_the_contrast_is_the_mean_over_orders_of_log_probabilities_a_token(rows, model, tokenizer, tmp_path):
    found = load_statements(file(tmp_path / "d.jsonl", rows))
    assert likelihood_contrast(model, tokenizer, found).tolist() == pytest.approx(
        by_hand(model, tokenizer, found), abs=1e-4
    )


@pytest.mark.parametrize(
    "rows", [[say("I am.", " Yes"), say("I am.", " No")], [choose("Which?", "This", "This", "(A)")]]
)
def test_a_liking_for_an_answer_is_no_behaviour(rows, model, tokenizer, tmp_path):
    """Questions that tell nothing apart: each order alone has a contrast, both together have none."""
    rows = rows * 2
    found = load_statements(file(tmp_path / "d.jsonl", rows))
    assert likelihood_contrast(model, tokenizer, found).tolist() == pytest.approx([0.0] * 2, abs=1e-5)
    alone = likelihood_contrast(model, tokenizer, found.model_copy(update={"orders": 1}))
    assert min(alone.abs().tolist()) > 1e-3


def test_an_item_counts_once_in_choosing_and_in_the_interval(model, tokenizer, tmp_path):
    rows = [choose(f"{i}?", f"a{i}", f"b{i}", "(A)") for i in range(12)]
    found = load_statements(file(tmp_path / "ab.json", rows))
    choosing, reporting = found.split()
    assert [len(part.pairs) for part in (choosing, reporting)] == [16, 8]
    assert asked(choosing) + asked(reporting) == asked(found)
    options = {"layer": [1], "doses": [0.1], "controls": 2, "max_perplexity": 9}
    vector = replace(random_direction(model), residual_norms=torch.ones(3))
    effect = contrast_effect(model, tokenizer, vector, found, **options)
    assert len(effect.random) == 2 and effect.effect.low <= effect.effect.mean <= effect.effect.high
    with pytest.raises(InputError, match="9 statement pairs are too few"):
        found.part(0, 9).split()


def test_a_judge_is_checked_on_each_pair_s_own_question(trait):
    found = Statements(question=["One?", "Two?"], pairs=[{"pos": "a", "neg": "b"}, {"pos": "c", "neg": "d"}])
    seen = []
    require_valid_judge(lambda q, a, r: seen.append((q, a)) or (90 if a in "ac" else 10), trait, found)
    assert seen == [("One?", "a"), ("Two?", "c"), ("One?", "b"), ("Two?", "d")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (TIDY[1:3], "Yes always shows the behaviour: give rows of both kinds"),
        ([TIDY[0], TEA[0]], "rows of both kinds: give Yes and No, or (A) and (B)"),
        ([{"question": "q", "answer": "a"}], "line 1: it has question, answer, not question, answer_matching_behavior"),
        ([{**TEA[0], "answer_matching_behavior": "(C)"}], "line 1: the answers are ('(C)', '(B)')"),
        ([choose("Which?", "a", "b\n (C) c", "(A)")], "line 1: the question has no two choices (A) and (B)"),
        ([{**TEA[0], "question": "Tea?"}], "line 1: the question has no two choices"),
    ],
)
def test_other_rows_are_named(rows, message: str, tmp_path):
    with pytest.raises(InputError) as error:
        load_statements(file(tmp_path / "d.jsonl", rows))
    assert message in str(error.value)


def test_statements_have_a_question_or_one_a_pair():
    pairs = [{"pos": "a", "neg": "b"}] * 3
    with pytest.raises(ValueError, match="2 questions for 3 pairs"):
        Statements(question=["a?", "b?"], pairs=pairs)
    with pytest.raises(ValueError, match="3 pairs are not items in 2 orders"):
        Statements(question="a?", pairs=pairs, orders=2)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks" / "behaviours").iterdir()), ids=lambda path: path.stem)
def test_the_files_of_the_page_are_eighteen_items_with_each_answer_as_often(path: Path):
    found = load_statements(path)
    assert found.orders == 2 and len(found.pairs) == 36 and len(found.split()[1].pairs) == 20
    first, second = asked(found)[::2], asked(found)[1::2]
    assert all(one[1:] == other[:0:-1] for one, other in zip(first, second))  # the answers change places
    assert len(set(found.questions)) == 36
