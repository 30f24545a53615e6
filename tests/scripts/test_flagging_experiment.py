"""The flagging experiment: its arithmetic against plain references, and the whole of it on a tiny model."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from helpers import make_tokenizer
from sklearn.metrics import roc_auc_score

from persona_vectors.vectors.moments import Moments
from persona_vectors.vectors.vector import PersonaVector

SCRIPTS = Path(__file__).parents[2] / "scripts"
HIDDEN, LAYERS, CONTROLS = 16, 2, 40


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import flagging_experiment

    return flagging_experiment


def test_all_areas_at_once_are_those_of_one(script):
    rng = np.random.default_rng(0)
    values, labels = rng.integers(0, 9, size=(3, 50, 4)).astype(float), rng.integers(0, 2, 50)  # with ties
    found = script.areas(values, labels)
    for direction in range(3):
        for layer in range(4):
            expected = roc_auc_score(labels, values[direction, :, layer])
            assert float(found[direction, layer]) == pytest.approx(expected)


def planted(script, rng, scales, trait) -> object:
    """Samples whose label moves the trait's direction, with a nuisance of higher variance in them."""
    label, question = rng.integers(0, 2, 400), np.arange(400) % 20
    hidden = rng.normal(size=(400, LAYERS, HIDDEN)) * scales + label[:, None, None] * trait
    read = torch.from_numpy(hidden).float()
    return script.Labelled([""] * 400, question, label, dict.fromkeys(script.METHODS, read))


def test_whitening_finds_a_plant_under_a_nuisance_and_random_directions_do_not(script):
    rng = np.random.default_rng(0)
    scales, trait = np.ones(HIDDEN), np.zeros(HIDDEN)
    scales[0], trait[5] = 10.0, 2.0
    choice, test = planted(script, rng, scales, trait), planted(script, rng, scales, trait)
    directions = torch.zeros(LAYERS, HIDDEN)
    directions[:, [0, 5]] = torch.tensor([1.0, 2.0])  # mostly the trait, and the nuisance drowns it
    vector = PersonaVector("t", "m", directions)
    neutral = torch.from_numpy(rng.normal(size=(500, LAYERS, HIDDEN)) * scales).float()
    found = script.experiment(choice, test, vector, Moments.of(neutral, model="m"), CONTROLS)
    lines = {line["method"]: line for line in script.rows("t", found, test)}
    plain, white = lines["raw projection"], lines["raw projection, whitened"]
    assert plain["auroc"] < 0.8 < 0.9 < white["auroc"] and white["evidence"] and not plain["evidence"]
    assert white["auroc"] > white["isotropic 95th"] > 0.5
    by_hand = roc_auc_score(test.label, test.read["raw projection"][:, white["layer"], 5])
    assert white["auroc"] == pytest.approx(by_hand, abs=0.02)
    assert len(script.by_layer("t", found)) == len(found) * LAYERS


@pytest.mark.slow
def test_the_experiment_on_a_tiny_model(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    directions = torch.randn(3, zoo.HIDDEN, generator=torch.Generator().manual_seed(0))
    PersonaVector("optimistic", "m", directions).save(tmp_path / "v.safetensors")
    command = [sys.executable, SCRIPTS / "flagging_experiment.py", tmp_path / "m", tmp_path / "v.safetensors"]
    command += ["--out", tmp_path / "out", "--samples", 1, "--choice-samples", 1, "--max-new-tokens", 6]
    command += ["--controls", 4, "--device", "cpu", "--fractions", "--gradients"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run([*map(str, command)], check=True, capture_output=True, env=environment, text=True)
    assert done.stdout.count("Flags(") == 5
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 9 and all(0 <= float(line["auroc"]) <= 1 for line in table)
    with (tmp_path / "out" / "layers.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 7 * 3
