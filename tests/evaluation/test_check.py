import json

import pytest

from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import load_trait
from persona_vectors.evaluation.check import Labelled, check_judge, load_labels, require_valid_judge
from persona_vectors.evaluation.likelihood import load_statements

SCORES = {"a": 90.0, "b": 60.0, "c": 55.0, "d": 10.0, "e": 20.0, "f": None}
LABELLED = [Labelled("q", text, text in "abe") for text in SCORES]


def fixed(question, answer, rubric):
    return SCORES[answer]


def test_agreement_is_counted_as_by_hand():
    """a, b, e show it; c is a false positive, e a false negative, f is not scored."""
    report = check_judge(fixed, LABELLED, "r")
    assert report.confusion == ((1, 1), (1, 2)) and report.abstained == 1
    assert report.auroc == pytest.approx(5 / 6)  # of the pairs (a, b, e) x (c, d), e < c alone is wrong
    agreed, chance = 3 / 5, (3 * 3 + 2 * 2) / 25
    assert report.kappa == pytest.approx((agreed - chance) / (1 - chance))
    assert "AUROC 0.83, kappa 0.17 on 6 answers (2 true and 1 false positives" in str(report)


def test_labels_come_from_jsonl_and_csv(tmp_path):
    lines = [{"question": "q", "answer": "a", "label": 1}, {"question": "q", "answer": "b, c", "label": 0}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "l.csv").write_text('question,answer,label\nq,a,1\nq,"b, c",0\n')
    expected = [Labelled("q", "a", True), Labelled("q", "b, c", False)]
    assert load_labels(tmp_path / "l.jsonl") == load_labels(tmp_path / "l.csv") == expected
    (tmp_path / "bad.csv").write_text("question,answer,label\nq,a,maybe\n")
    with pytest.raises(InputError, match=r"bad\.csv, answer 1: give question, answer and label"):
        load_labels(tmp_path / "bad.csv")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(InputError, match="is not JSONL"):
        load_labels(tmp_path / "bad.jsonl")


def test_the_gate_passes_a_judge_that_sees_the_trait_and_no_other():
    trait, statements = load_trait("optimistic"), load_statements("optimistic")
    positive = {pair.pos for pair in statements.pairs}
    assert require_valid_judge(lambda q, answer, r: 80 if answer in positive else 20, trait, statements).auroc == 1
    with pytest.raises(InputError, match=r"cannot be trusted with 'optimistic': .* AUROC 0\.50"):
        require_valid_judge(lambda q, answer, r: 50, trait, statements)
    with pytest.raises(InputError, match="take a stronger judge"):
        require_valid_judge(lambda q, answer, r: 20 if answer in positive else 80, trait, statements)
    few = {pair.pos for pair in statements.pairs[:2]} | {pair.neg for pair in statements.pairs[:2]}
    known = {**dict.fromkeys(few, 20), **dict.fromkeys(positive & few, 80)}
    with pytest.raises(InputError, match="44 abstentions"):
        require_valid_judge(lambda q, answer, r: known.get(answer), trait, statements)
    with pytest.raises(InputError, match="scored 0 of 48 answers"):
        require_valid_judge(lambda *_: None, trait, statements)
