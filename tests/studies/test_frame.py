import math

import pytest
from helpers import run, save_tiny

from persona_vectors.data.errors import InputError
from persona_vectors.data.intervals import Interval
from persona_vectors.studies import persona_judge
from persona_vectors.studies.frame import NAMES, Line, Study, module_of


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_study_is_a_table_with_intervals_and_a_null_and_goes_on_where_it_stopped(study, tmp_path, name):
    found = study(name)
    assert all(isinstance(line, Line) and math.isfinite(line.value.mean) for line in found.lines)
    assert any(line.value.low <= line.value.mean <= line.value.high for line in found.lines)
    assert any(math.isfinite(line.null) and line.null_of for line in found.lines)
    assert str(Study.load(tmp_path / f"{name}.json")) == str(found)  # a nan is not equal to itself
    page = (tmp_path / f"{name}.md").read_text()
    assert "The paper:" in page and "cannot" in page and f"{found.lines[0].value:.3f}" in page
    ledger = tmp_path / f"{name}.jsonl"
    kept = ledger.read_bytes()
    assert kept.count(b"\n") > 1 and str(study(name)) == str(found) and ledger.read_bytes() == kept


def test_other_settings_and_too_few_vectors_are_refused(study, vectors, monkeypatch):
    monkeypatch.setattr(persona_judge, "lines", lambda given: [])
    study("persona_judge")
    with pytest.raises(InputError, match="size=1, not 3"):
        study("persona_judge", size=3)
    vectors.clear()
    with pytest.raises(InputError, match="needs 1 vectors, and 0 are given"):
        study("persona_judge")
    with pytest.raises(InputError, match="no study 'nothing': give one of atomic_fidelity"):
        module_of("nothing")


def test_a_table_shows_what_it_holds():
    lines = (
        Line("a rate", Interval(0.5, 0.25, 0.75), 0.1, "chance"),
        Line("a number", Interval(2, math.nan, math.nan)),
    )
    page = Study("persona_judge", "m", "persona-vectors study", 1.5, lines).page()
    assert page.startswith(f"# {persona_judge.__doc__.splitlines()[0].rstrip('.')}\n")
    assert "`persona-vectors study`: 1.5 minutes of processor time on m." in page
    assert "| a rate | 0.500 [0.250, 0.750] | 0.100 | chance |\n| a number | 2.000 |  |  |\n" in page


def test_the_command_prints_the_page(vectors, tmp_path, monkeypatch):
    line = Line("acceptance of a drafted token", Interval(0.5, 0.25, 0.75))
    monkeypatch.setattr(persona_judge, "lines", lambda given: [line])
    files = [tmp_path / f"{vector.trait}.safetensors" for vector in vectors]
    for vector, file in zip(vectors, files):
        vector.save(file)
    options = ["--vector", files[0], "--size", "1", "--out", tmp_path / "out"]
    out, _ = run("study", "persona_judge", save_tiny(tmp_path / "tiny"), *options)
    assert "acceptance of a drafted token" in out and "`persona-vectors study persona_judge" in out
    _, error = run("study", "localizing", "m", "--features", files[0], code=2)
    assert "--features is for persona_features: leave it out for localizing" in error
    with pytest.raises(InputError, match="--features is for persona_features: leave it out for localizing"):
        module_of("localizing", files[0])
    _, error = run("study", "nothing", "m", code=2)
    assert "no study 'nothing'" in error
