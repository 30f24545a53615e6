import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers import save_tiny

from persona_vectors.data.errors import InputError
from persona_vectors.vectors.vector import PersonaVector

PATH = Path(__file__).parents[2] / "scripts" / "monitoring_experiment.py"
SPEC = importlib.util.spec_from_file_location("monitoring_experiment", PATH)
assert SPEC is not None and SPEC.loader is not None
experiment = sys.modules["monitoring_experiment"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(experiment)


def test_the_experiment_runs_and_goes_on_from_its_answers(trait, tmp_path, capsys, monkeypatch):
    tiny, out = save_tiny(tmp_path / "tiny"), tmp_path / "out"
    trait.save(tmp_path / "loud.json")
    PersonaVector("loud", "tiny", torch.randn(3, 32)).save(tmp_path / "v.safetensors")
    options = {"layer": 1, "samples": 2, "max_new_tokens": 4, "controls": 5, "out": out, "device": "cpu"}
    run = [str(tiny), tmp_path / "v.safetensors", str(tmp_path / "loud.json")]
    experiment.main(*run, **options)
    points = list(csv.DictReader((out / "points.csv").open()))
    assert len(points) == (8 + len(experiment.SHOTS)) * 2
    assert {point["asked"] for point in points} == {"Who?", "What?"}  # never the questions of the extraction
    table = (out / "correlations.md").read_text()
    assert table in capsys.readouterr().out and table.count("the vector") == 2 and "/5" in table
    assert (out / "monitoring.png").stat().st_size > 10_000
    monkeypatch.setattr(experiment, "generate_batches", None)  # a second run makes no answer again
    before = (out / "points.csv").read_text()
    experiment.main(*run, **options)
    assert (out / "points.csv").read_text() == before
    with pytest.raises(InputError, match="holds a run with samples 2, not 3"):
        experiment.main(*run, **options | {"samples": 3})
    with pytest.raises(InputError, match="give --layer"):
        experiment.main(*run, **options | {"layer": None})


def test_a_predictor_that_knows_the_score_has_r_1_and_the_text_baseline_reads_words(trait):
    texts = [f"{'good' if i % 2 else 'bad'} question {i // 2}" for i in range(20)]
    scores, questions = [80.0 if i % 2 else 20.0 for i in range(20)], [i // 2 for i in range(20)]
    predicted = experiment.text_baseline(texts, scores, questions)
    assert experiment.correlation_interval(predicted, scores, questions).mean > 0.95
    points = [
        {"condition": f"system {i % 2}", "question": q, "score": s, "projection": 2 * s + 1, "text": t}
        for i, (t, s, q) in enumerate(zip(texts, scores, questions))
    ]
    vector = PersonaVector("t", "m", torch.ones(1, 6))
    lines = experiment.compare("system", points, torch.randn(20, 1, 6), vector, 0, 4)
    assert lines[0]["r"] == pytest.approx(1) and lines[1]["below_the_vector"] == "4/4"
