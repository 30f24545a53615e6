"""The benchmark from a trait to a vector: that each way does what it says."""

import subprocess

import pytest
import torch
from bench import end_to_end
from helpers import save_tiny

import persona_vectors as pv

OPTIONS = {"samples": 2, "first": 2, "max_new_tokens": 5, "min_pairs": 1}


def test_the_official_procedure_gives_our_vector_from_the_same_answers(model, tokenizer, trait, tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    pv.extract(model, tokenizer, trait, judge=None, rollouts=path, **OPTIONS)
    made = [r for side in ("pos", "neg") for r in pv.load_rollouts(path, side=side, trait=trait, tokenizer=tokenizer)]
    texts = {(r.side, *r.key): r.answer for r in made}
    plan = end_to_end.plan(tokenizer, trait, first=2, samples=2)
    keys = [(task["side"], task["pair"], task["question"], task["sample"]) for task in plan]
    monkeypatch.setattr(end_to_end, "official_answers", lambda *_: [texts[key] for key in keys])
    theirs = end_to_end.official_vector(model, tokenizer, trait, None, **OPTIONS)
    again = [r.model_copy(update={"answer_ids": tuple(end_to_end.encode(tokenizer, r.answer))}) for r in made]
    ours = pv.extract_from(model, tokenizer, trait, again, judge=None, unfiltered=True, min_pairs=1)
    torch.testing.assert_close(theirs[1:-1], ours.directions[:-1], rtol=1e-4, atol=1e-5)


def test_official_answers_are_transformers_own(model, tokenizer, monkeypatch):
    monkeypatch.setattr(end_to_end, "BATCH", 2)
    model.generation_config.eos_token_id = None
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7, 8]]
    torch.manual_seed(0)
    texts = end_to_end.official_answers(model, tokenizer, prompts, max_new_tokens=4)
    torch.manual_seed(0)
    pad = tokenizer.pad_token_id
    ids, mask = torch.tensor([[5, 6, 7], [pad, 8, 9]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    made = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=True, top_k=0)[:, 3:]
    assert texts[:2] == [tokenizer.decode(row, skip_special_tokens=True) for row in made] and len(texts) == 3


def test_rounds_are_interleaved_and_ratios_taken_within_them(model, tokenizer, trait, capsys):
    ways, order = end_to_end.ways_of(model, tokenizer, trait, None, OPTIONS), []
    for way in ways:
        run = way.run
        way.run = lambda more, run=run, name=way.name: (order.append(name), run(more))[1]
    end_to_end.run_ways(ways, 2)
    assert order[2:] == ["ours", "official procedure", "official procedure", "ours"]
    ways[0].seconds, ways[1].seconds = [1.0, 2.0, 4.0], [2.0, 5.0, 4.0]
    table = end_to_end.report(ways, answers=24)
    assert [line["ours x"] for line in table] == [1.0, 2.0] and table[0]["answers/min"] == 60 * 24 / 2
    assert "official procedure" in capsys.readouterr().out


@pytest.mark.slow
def test_ours_as_of_a_commit_runs_in_a_process_of_its_own(tmp_path, trait):
    if subprocess.run(["git", "-C", end_to_end.ROOT, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    trait.save(tmp_path / "loud.json")
    given = [str(save_tiny(tmp_path / "tiny")), "cpu", str(tmp_path / "loud.json"), "none", 1, OPTIONS]
    with end_to_end.earlier("HEAD", given) as way:
        assert way.run({"seed": 1}) > 0
    listed = subprocess.run(["git", "-C", end_to_end.ROOT, "worktree", "list"], capture_output=True, text=True).stdout
    assert "/then" not in listed
