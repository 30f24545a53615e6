import json

import equal_kl
import pytest
import torch
from helpers import random_direction, save_tiny

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.evaluation.cost import kl_cost


@pytest.mark.slow
def test_the_table_has_every_method_at_every_cost_beside_its_null_and_goes_on(tmp_path, capsys, monkeypatch):
    tiny = save_tiny(tmp_path / "tiny")
    model, tokenizer = pv.load_model(str(tiny))
    random_direction(model).save(tmp_path / "v.safetensors")
    monkeypatch.setattr(equal_kl, "TEXTS", equal_kl.TEXTS[:1])
    run = str(tiny), tmp_path / "v.safetensors", "optimistic"
    options = {"layer": 1, "kl": "0.002", "controls": 1, "positions": "response", "max_new_tokens": 3}
    options |= {"out": tmp_path / "out", "device": "cpu"}
    equal_kl.main(*run, **options)
    text = (tmp_path / "out" / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert len(text.splitlines()) == 2 + 5 + 1 and text.count("| 0.002 |") == 5
    assert (tmp_path / "out" / "methods.png").stat().st_size > 10_000
    entries = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()[1:]]
    assert len({entry["key"] for entry in entries}) == len(entries) == 2 + 2 * 5
    assert all(len(entry["answers"]) == 20 for entry in entries if entry.get("strength", 1) is not None)
    own = {e["key"]: e["strength"] for e in entries if e["key"].startswith("t, ")}
    methods = equal_kl.Methods(model, tokenizer, pv.load_statements("optimistic"), 1, "response")
    for method, edit in methods.of(random_direction(model)).items():  # every method costs what it was asked to
        strength = own[f"t, {method}, 0.002"]
        if strength is None:  # a rotation moves each token, however far
            assert method == "rotate"
            continue
        assert kl_cost(model, tokenizer, edit, texts=equal_kl.TEXTS)(strength) == pytest.approx(0.002, rel=0.15)
    monkeypatch.setattr(pv, "generate", None)  # a second run makes no answer again
    equal_kl.main(*run, **options)
    assert (tmp_path / "out" / "table.md").read_text() == text
    with pytest.raises(InputError, match="was made with max_new_tokens=3, not 4"):
        equal_kl.main(*run, **options | {"max_new_tokens": 4})


def test_the_effect_is_the_mean_difference_from_plain_and_unreached_costs_have_none(tmp_path, trait):
    ledger = equal_kl.Ledger(tmp_path / "a.jsonl")
    ledger.add([{"key": "plain", "scores": [50.0, 60.0]}, {"key": "x", "scores": [70.0, 70.0]}, {"key": "y"}])
    run = equal_kl.Run(None, None, trait, ledger, 4)
    assert run.effect("x").mean == 15 and run.effect("y") is None
    assert equal_kl.angle(1.0) == pytest.approx(45) and equal_kl.angle(1e-9) == pytest.approx(90)
    assert equal_kl.shown("rotate", 1.0) == "to 45 degrees"
    assert equal_kl.shown("floor", 2) == "lowest +2.00 v"


def test_the_gate_is_open_near_the_opposite_and_shut_near_the_trait(model, tokenizer):
    statements = pv.load_statements("optimistic")
    methods = equal_kl.Methods(model, tokenizer, statements, 1, "all")
    near = pv.nearest_coef(methods.states, 3.0 * methods.needed, k=1)(methods.states[None])
    assert torch.equal(near[0], torch.tensor([0.0, 3.0] * len(statements.pairs)))
