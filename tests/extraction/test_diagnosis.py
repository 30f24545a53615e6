"""diagnose: each figure where it is known in closed form, and through a model against a plain reference."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import block_outputs, random_direction, run, save_tiny

import persona_vectors as pv
from persona_vectors import InputError, extract
from persona_vectors.extraction.diagnosis import Diagnosis, diagnose
from persona_vectors.extraction.evidence import agreement, difference, other_questions, split_half_cosine
from persona_vectors.extraction.rollouts import read_jsonl

SMALL = {"samples": 2, "max_new_tokens": 6, "batch_tokens": 400, "min_pairs": 2, "judge": None}


def planted(*steps: list[float]):
    """Pairs of one layer: negative answers at the origin, positive ones a step away."""
    return lambda: ((torch.tensor([step]), torch.zeros(1, len(step))) for step in steps)


def test_the_cosine_is_the_mean_of_the_pairs_cosines_whatever_their_lengths():
    found = agreement([torch.tensor([[2.0, 0.0]])], planted([3.0, 4.0], [0.0, 7.0], [50.0, 0.0]), torch.arange(3))
    assert float(found["pair_cosine"]) == pytest.approx((0.6 + 0 + 1) / 3)


def test_a_question_moves_the_wrong_way_where_its_pairs_do_taken_together():
    steps = [1.0, 9.0], [-3.0, 0.0], [-1.0, 5.0], [2.0, 0.0], [1.0, 0.0]  # the first two are of one question: -2
    found = agreement([torch.tensor([[1.0, 0.0]])], planted(*steps), torch.tensor([0, 0, 1, 2, 3]))
    assert float(found["wrong_way"]) == 0.5


def test_separation_is_the_share_of_answers_that_are_in_order():
    pos, neg = [3.0, 1.0, 5.0], [0.0, 2.0, 4.0]  # in order are 3 of 3, 1 of 3 and 2 of 3 positive-negative pairs
    both = [(torch.tensor([[a, 1.0]]), torch.tensor([[b, 1.0]])) for a, b in zip(pos, neg)]
    found = agreement([torch.tensor([[1.0, 0.0]])], lambda: iter(both), torch.arange(3))
    assert float(found["separation"]) == pytest.approx(sum(a > b for a in pos for b in neg) / 9)


def test_halves_and_folds_of_two_questions_are_the_questions():
    pairs, question = planted([1.0, 0.0], [3.0, 4.0], [3.0, 4.0]), torch.tensor([0, 1, 1])
    direction = difference(pairs, question)
    assert float(split_half_cosine(direction, 2)) == pytest.approx(0.6)
    torch.testing.assert_close(other_questions(direction, 2), [torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])])
    assert float(agreement(other_questions(direction, 2), pairs, question)["pair_cosine"]) == pytest.approx(0.6)


def test_noise_agrees_with_the_vector_of_other_questions_by_chance_alone():
    """Held against what it is part of itself, the same noise would look like a vector."""
    noise = torch.randn(2, 60, 1, 200, generator=torch.Generator().manual_seed(0))
    question = torch.arange(60) % 20
    direction = difference(lambda: zip(*noise), question)
    whole = direction(torch.ones(20, dtype=torch.bool))
    inside = agreement([whole], lambda: zip(*noise), question)
    outside = agreement(other_questions(direction, 20), lambda: zip(*noise), question)
    assert float(inside["wrong_way"]) == 0 and float(inside["separation"]) > 0.9
    assert float(inside["pair_cosine"]) == pytest.approx(1 / math.sqrt(60), abs=0.03)
    assert abs(float(outside["pair_cosine"])) < 0.03 and 0.4 < float(outside["separation"]) < 0.6
    assert 0.2 < float(outside["wrong_way"]) < 0.8


def test_a_model_s_answers_are_diagnosed_as_the_words_have_it(tmp_path, model, tokenizer, trait):
    path = tmp_path / "r.jsonl"
    own = extract(model, tokenizer, trait, rollouts=path, **SMALL)
    other = random_direction(model)
    found = diagnose(model, tokenizer, other, rollouts=path)
    rollouts = read_jsonl(path)[1]
    means = {
        (r.side, r.key): block_outputs(model, [*r.prompt_ids, *r.answer_ids])[:, len(r.prompt_ids) :].mean(dim=1)
        for r in rollouts
        if r.answer.strip()
    }
    steps = {
        key: means["pos", key] - means["neg", key] for side, key in means if side == "pos" and ("neg", key) in means
    }
    units = other.directions / other.directions.norm(dim=1, keepdim=True)
    cosines = torch.stack([(step * units).sum(dim=1) / step.norm(dim=1) for step in steps.values()]).mean(dim=0)
    totals = [sum((s * units).sum(dim=1) for k, s in steps.items() if k[1] == q) for q in {k[1] for k in steps}]
    assert (found.own, found.pairs, found.questions) == (False, len(steps), 4)
    assert found.pair_cosine == pytest.approx(cosines.tolist(), abs=1e-4)
    assert found.wrong_way == pytest.approx((torch.stack(totals) < 0).float().mean(dim=0).tolist())
    mine = diagnose(model, tokenizer, own, rollouts=rollouts)
    assert mine.own and mine.separation == pytest.approx(own.separation.tolist())
    assert mine.split_half_cosine == pytest.approx(own.split_half_cosine.tolist(), abs=1e-4)
    assert diagnose(model, tokenizer, 3 * own, rollouts=path).own
    mine.save(tmp_path / "d.json")
    assert Diagnosis.load(tmp_path / "d.json") == mine and len(mine.rows()) == len(own.directions)
    assert len(mine.plot().axes) == 2


def test_answers_are_filtered_as_the_vector_s_were(tmp_path, model, tokenizer, trait):
    own = extract(model, tokenizer, trait, rollouts=tmp_path / "r.jsonl", **SMALL)
    rollouts = read_jsonl(tmp_path / "r.jsonl")[1]
    strict = replace(own, info={**own.info, "threshold": 50.0})
    good = {("pos", "How?"): 90.0, ("pos", "Where?"): 90.0}
    scored = [
        r.model_copy(update={"trait_score": good.get((r.side, r.question), 10.0), "coherence": 80.0}) for r in rollouts
    ]
    assert diagnose(model, tokenizer, strict, rollouts=scored).questions == 2
    with pytest.raises(InputError, match=r"0 answer pairs of 24 positive .* at 50.0, of 0 questions, .* give the"):
        diagnose(model, tokenizer, strict, rollouts=rollouts)
    with pytest.raises(InputError, match="no rollouts file"):
        diagnose(model, tokenizer, own, rollouts=tmp_path / "none.jsonl")


def test_the_command_prints_a_row_a_layer(tmp_path, trait):
    tiny = save_tiny(tmp_path / "tiny")
    model, tokenizer = pv.load_model(str(tiny))
    path, vector = tmp_path / "r.jsonl", tmp_path / "v.safetensors"
    extract(model, tokenizer, trait, rollouts=path, **SMALL).save(vector)
    files = "--out", tmp_path / "d.json", "--plot", tmp_path / "d.png"
    out, _ = run("diagnose", tiny, vector, "--rollouts", path, *files, "--json")
    assert json.loads(out) == Diagnosis.load(tmp_path / "d.json").rows()
    assert (tmp_path / "d.png").read_bytes()[:4] == b"\x89PNG"
    out, _ = run("diagnose", tiny, vector, "--rollouts", path)
    assert "each held against the vector of other questions" in out
    assert len(out.splitlines()) == 2 + len(json.loads((tmp_path / "d.json").read_text())["pair_cosine"])
