"""Results are tables: what is saved is what was found, and rows are plain."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from persona_vectors.data.errors import InputError
from persona_vectors.data.intervals import Interval
from persona_vectors.evaluation.answers import Evaluation, Scored
from persona_vectors.evaluation.check import JudgeReport
from persona_vectors.evaluation.contrast import ContrastEffect
from persona_vectors.evaluation.points import Point, Sweep
from persona_vectors.training.shifts import Shift
from persona_vectors.vectors.vector import PersonaVector

HALF = Interval(0.5, math.nan, 1.0)
POINT = Point("report", "loud", None, 0.0, 0.0, HALF, HALF, HALF, math.nan, 3.0)
RESULTS = [
    Evaluation("loud", "none", HALF, HALF, (Scored("How?", "<b>So</b>\n", None, 80.0),)),
    Sweep("loud", "tiny", "j", "coef", 1, 2.0, 2.0, (POINT, replace(POINT, layer=3))),
    ContrastEffect("loud", 1, 0.1, 2.0, HALF, HALF, (0.1, 0.2), (0.0,), None, (1.0, 1.5)),
    JudgeReport("j", 4, 1, 0.75, 0.5, ((1, 0), (1, 2))),
    Shift(("a", "b"), (1, 2), ("How?",), torch.full((1, 2, 4), torch.nan), torch.randn(1, 2, 4)),
]


@pytest.mark.parametrize("result", RESULTS, ids=lambda result: type(result).__name__)
def test_what_is_saved_is_what_was_found(result, tmp_path):
    result.save(tmp_path / "r.json")
    loaded = type(result).load(tmp_path / "r.json")
    np.testing.assert_equal(loaded.rows(), result.rows())
    assert repr(loaded) == repr(result)
    json.dumps(result.rows())  # plain values


def test_the_columns_of_contrasts_are_the_same_with_and_without_a_trait():
    effect = RESULTS[2]
    assert list(effect.rows()[0]) == list(replace(effect, prompted=HALF).rows()[0])


def test_a_shift_knows_the_layer_of_each_row():
    shift = replace(RESULTS[4], base=torch.zeros(1, 2, 4))
    places = [(row["trait"], row["layer"]) for row in shift.rows() if row["pooling"] == "prompt_last"]
    assert places == [("a", 1), ("b", 1), ("a", 2), ("b", 2)] and shift.keys == ["a@1", "b@1", "a@2", "b@2"]
    one = replace(shift, layers=(7,), base=torch.zeros(1, 2, 2), tuned=torch.ones(1, 2, 2))
    assert {row["layer"] for row in one.rows()} == {7} and one.keys == ["a", "b"]


def test_another_file_is_refused(tmp_path):
    RESULTS[0].save(tmp_path / "r.json")
    with pytest.raises(InputError, match="is a Evaluation file of format 1, not Sweep of 1"):
        Sweep.load(tmp_path / "r.json")
    (tmp_path / "cut.json").write_text('{"kind": "Sweep", "format_version": 1}')
    with pytest.raises(InputError, match="no whole sweep file: field trait"):
        Sweep.load(tmp_path / "cut.json")
    (tmp_path / "no.json").write_text("[1")
    with pytest.raises(InputError, match="is no sweep file"):
        Sweep.load(tmp_path / "no.json")
    with pytest.raises(InputError, match="no sweep file"):
        Sweep.load(tmp_path / "none.json")


def test_pandas_is_asked_for_by_name(monkeypatch):
    assert list(RESULTS[1].to_pandas()["score_high"]) == [1.0, 1.0]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        RESULTS[1].to_pandas()


def test_results_show_themselves_in_a_notebook_short_and_escaped(trait):
    hostile = "<script>alert(1)</script> & " + "long " * 100
    answers = tuple(Scored(hostile, f"answer {i}", None if i else 12.3456789, 50.0) for i in range(12))
    found = Evaluation("calm", "a <judge>", Interval(12.3, 1.0, 20.0), Interval(50.0, 50.0, 50.0), answers)
    assert repr(found) == (
        "Evaluation('calm': score 12.3 [1.0, 20.0], coherence 50.0 [50.0, 50.0]; 12 answers, 11 not scored; "
        "judge: a <judge>)"
    )
    html = found._repr_html_()
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; long" in html and "…" in html
    assert "a &lt;judge&gt;" in html and "12.35" in html and "and 2 rows more" in html
    assert html.count("<tr>") == 11 and "answer 9<" in html and "answer 10<" not in html and len(html) < 6000
    odd = trait.model_copy(update={"description": "<b>loud</b>"})._repr_html_()
    assert "&lt;b&gt;loud&lt;/b&gt;" in odd and "Be loud 0." in odd and "Be quiet, 2." in odd and "Where?" not in odd
    vector = PersonaVector("<i>", "m", torch.eye(2, 4))
    assert "&lt;i&gt;" in vector._repr_html_() and "none is stored" in vector._repr_html_()
