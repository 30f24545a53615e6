import csv
import json
import zlib
from pathlib import Path

import pytest
import torch
import zoo
from helpers import make_tokenizer

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import writing
from persona_vectors.data.traits import Trait
from persona_vectors.extraction import filtering
from persona_vectors.extraction.difference import extract, extract_from, extract_poolings_from
from persona_vectors.extraction.evidence import evidence
from persona_vectors.extraction.rollouts import Rollout, load_rollouts
from persona_vectors.model.pooling import POOLINGS
from persona_vectors.model.prompts import chat_prompt, encode

SMALL = {"samples": 2, "max_new_tokens": 6, "batch_tokens": 400, "min_pairs": 2}


class FakeJudge:
    """Scores an answer by its text, 80 or 20, or always by `score`; coherence is 80. Counts its calls."""

    def __init__(self, score: float | None = -1.0):
        self.score, self.calls = score, 0

    def __call__(self, question: str, answer: str, rubric: str) -> float | None:
        self.calls += 1
        if "coherent" in rubric:
            return 80.0
        return self.score if self.score != -1 else (80.0 if zlib.crc32(answer.encode()) % 2 else 20.0)


def official_procedure(model, tokenizer, pairs: list[tuple[str, str]], pooling: str) -> torch.Tensor:
    """The paper's extraction, one text at a time: [layer + 1, hidden] with the embeddings at 0."""
    means = []
    for prompt, answer in pairs:
        ids = torch.tensor([encode(tokenizer, prompt + answer)])
        n = len(encode(tokenizer, prompt))
        with torch.no_grad():
            states = torch.stack(model(input_ids=ids, output_hidden_states=True).hidden_states)[:, 0]
        pooled = {"response_mean": states[:, n:].mean(1), "prompt_mean": states[:, :n].mean(1)}
        means.append((pooled | {"prompt_last": states[:, n - 1]})[pooling])
    return torch.stack(means).mean(dim=0)


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "prompt", "answer", "question_id", "loud", "coherence"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def official_rows(tokenizer, trait: Trait, side: str) -> list[dict]:
    rows = []
    for i, question in enumerate(trait.questions.extract * 4):
        prompt = chat_prompt(tokenizer, question, system=trait.system_prompt(side, i % 3))
        answer = f"{side} answer {i},\nwith a second line" if i != 3 else ""
        score = "" if i == 5 else (85.0 if side == "pos" else 10.0)
        row = {"question": question, "prompt": prompt, "answer": answer, "question_id": f"loud_{i}"}
        rows.append({**row, "loud": score, "coherence": 30.0 if i == 6 else 90.0})
    return rows


@pytest.mark.parametrize("pooling", POOLINGS)
def test_official_rollouts_give_the_official_vector(tmp_path, model, tokenizer, trait, pooling):
    rows = {side: official_rows(tokenizer, trait, side) for side in ("pos", "neg")}
    loaded = []
    for side in rows:
        path = write_csv(tmp_path / f"{side}.csv", rows[side])
        loaded += load_rollouts(path, side=side, trait=trait, tokenizer=tokenizer)
    vector = extract_from(model, tokenizer, trait, loaded, judge=None, pooling=pooling, min_pairs=2)
    kept = [i for i in range(16) if i not in (3, 5, 6)]  # an empty answer, a refusal, an incoherent one
    expected = [
        official_procedure(model, tokenizer, [(rows[s][i]["prompt"], rows[s][i]["answer"]) for i in kept], pooling)
        for s in ("pos", "neg")
    ]
    difference = (expected[0] - expected[1])[1:-1]  # without embeddings, and without the last row, after the norm
    torch.testing.assert_close(vector.directions[:-1], difference, rtol=1e-3, atol=1e-5)
    assert vector.info["pairs_kept"] == 13 and vector.info["empty"] == 2
    assert vector.info["judge"] == "scores in the rollout file"


def test_extraction_while_generating_equals_the_second_pass(tmp_path, model, tokenizer, trait):
    path = tmp_path / "r.jsonl"
    direct = extract(model, tokenizer, trait, judge=None, rollouts=path, **SMALL)
    both = [r for side in ("pos", "neg") for r in load_rollouts(path, side=side, trait=trait, tokenizer=tokenizer)]
    second = extract_from(model, tokenizer, trait, both, judge=None, unfiltered=True, min_pairs=2)
    with pytest.raises(InputError, match="no answer has a score for 'loud': give a judge, or unfiltered=True"):
        extract_from(model, tokenizer, trait, both, judge=None, min_pairs=2)
    resumed = extract(model, tokenizer, trait, judge=None, rollouts=path, **SMALL)
    for other in (second, resumed):
        torch.testing.assert_close(direct.directions, other.directions, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(direct.residual_norms, other.residual_norms, rtol=1e-4, atol=1e-4)
    assert direct.info["judge"] == "none" and direct.info["threshold"] is None


def test_a_run_that_was_cut_anywhere_goes_on_to_the_same_answers(tmp_path, model, tokenizer, trait):
    whole = tmp_path / "whole.jsonl"
    vector = extract(model, tokenizer, trait, judge=FakeJudge(), rollouts=whole, **SMALL)
    text = whole.read_bytes()
    lines = text.splitlines(keepends=True)
    calls = []
    cuts = (len(lines[0]) + 3, sum(map(len, lines[:8])), len(text) // 2, len(text) - 5)
    for cut, width in zip(cuts, (400, 70, 1000, None)):  # in batches of another size
        path, judge = tmp_path / f"cut{cut}.jsonl", FakeJudge()
        path.write_bytes(text[:cut])
        again = extract(model, tokenizer, trait, judge=judge, rollouts=path, **SMALL | {"batch_tokens": width})
        assert path.read_bytes() == text
        calls.append(judge.calls)
        torch.testing.assert_close(again.directions, vector.directions, rtol=1e-3, atol=1e-5)
    assert calls[0] == 2 * 48 > calls[2] > calls[3]  # what is on the disk is not made again


def test_batches_of_any_size_give_the_same_answers_and_the_same_vector(tmp_path, model, tokenizer, trait):
    made = []
    for width in (1, 70, 200, 500, None):  # one row a batch, a few, all 24
        path, options = tmp_path / f"{width}.jsonl", SMALL | {"batch_tokens": width, "first": 2}
        made.append((extract(model, tokenizer, trait, judge=FakeJudge(), rollouts=path, **options), path.read_bytes()))
    for vector, text in made[1:]:
        assert text == made[0][1]
        torch.testing.assert_close(vector.directions, made[0][0].directions, rtol=1e-3, atol=1e-5)


def test_the_same_seed_gives_the_same_answers_and_another_gives_others(tmp_path, model, tokenizer, trait):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        extract(model, tokenizer, trait, judge=None, seed=seed, rollouts=tmp_path / name, **SMALL)
        texts.append((tmp_path / name).read_text().split("\n", 1)[1])
    assert texts[0] == texts[1] != texts[2]


def test_other_settings_are_refused_with_the_difference_named(tmp_path, model, tokenizer, trait):
    extract(model, tokenizer, trait, judge=None, rollouts=tmp_path / "r.jsonl", **SMALL)
    with pytest.raises(InputError, match="was made with seed=0, not 7: give the same settings, or another file"):
        extract(model, tokenizer, trait, judge=None, seed=7, rollouts=tmp_path / "r.jsonl", **SMALL)


def test_the_filter_drops_pairs_and_the_error_counts_them(model, tokenizer, trait):
    with pytest.raises(InputError, match="only 0 answer pairs of 24 positive and 24 negative answers survived"):
        extract(model, tokenizer, trait, judge=FakeJudge(90.0), **SMALL)  # the negative answers score 90 as well
    with pytest.raises(InputError, match=r"0 positive and 0 negative ones passed.*take another judge"):
        extract(model, tokenizer, trait, judge=FakeJudge(None), **SMALL)


def test_the_callable_judge_protocol_and_its_garbage(model, tokenizer, trait):
    with pytest.raises(InputError, match="the judge returned 'high': return a number from 0 to 100"):
        extract(model, tokenizer, trait, judge=lambda question, answer, rubric: "high", **SMALL)


def test_a_planted_direction_is_recovered_with_its_evidence():
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(2, 50, generator=generator)
    planted[1] = 0  # the second layer holds nothing
    noise = torch.randn(2, 200, 2, 50, generator=generator) * 3
    pos, neg = noise[0] + planted, noise[1] - planted
    question = torch.arange(200) % 20
    _, half, area = evidence(lambda: zip(pos, neg), question).values()
    assert half[0] > 0.8 and abs(half[1]) < 0.3
    assert area[0] > 0.95 and 0.35 < area[1] < 0.65


def test_one_question_gives_no_evidence():
    acts = torch.randn(6, 2, 8)
    assert set(evidence(lambda: zip(acts, -acts), torch.zeros(6, dtype=torch.long))) == {"directions"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question,answer\na,b\n", "lacks the column prompt"),
        ("question,prompt,answer,loud,coherence\na,b,c,high,90\n", "row 1: loud is 'high', not a number or empty"),
        (
            "question,prompt,answer,evil,coherence\na,b,c,80,90\n",
            "no scores for 'loud', or no coherence: it has",
        ),
        ("question,prompt,answer,loud\na,b,c,80\n", "no scores for 'loud', or no coherence"),
    ],
)
def test_bad_rollout_csvs(tmp_path, model, tokenizer, trait, text, message):
    path = tmp_path / "pos.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        extract_from(
            model, tokenizer, trait, load_rollouts(path, side="pos", trait=trait, tokenizer=tokenizer), judge=None
        )


def test_bad_rollout_jsonl_names_the_line(tmp_path, trait, tokenizer):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"persona_vectors_rollouts": 1}) + '\n{"side": "pos"}\n')
    with pytest.raises(InputError, match=r"r.jsonl, line 2: field pair: Field required; give our JSONL"):
        load_rollouts(path, side="pos", trait=trait, tokenizer=tokenizer)
    path.write_text('{"persona_vectors_rollouts": 9}\n')
    with pytest.raises(InputError, match="no header of rollout format 1"):
        load_rollouts(path, side="pos", trait=trait, tokenizer=tokenizer)


def test_models_and_options_that_cannot_be(model, tokenizer, trait):
    with pytest.raises(InputError, match="encoder-decoder model"):
        extract(zoo.build("t5"), tokenizer, trait, judge=None)
    with pytest.raises(InputError, match="give one of response_mean, prompt_mean, prompt_last"):
        extract(model, tokenizer, trait, judge=None, pooling="mean")
    with pytest.raises(InputError, match="has no questions to extract with"):
        extract(model, tokenizer, trait.model_copy(update={"questions": {}}).model_validate({
            **trait.model_dump(), "questions": {"eval": ["a?"]}}), judge=None)  # fmt: skip
    with pytest.raises(InputError, match="has no chat template"):
        extract(model, make_tokenizer(template=None), trait, judge=None)


def test_two_runs_do_not_write_one_file(tmp_path, model, tokenizer, trait):
    path = tmp_path / "r.jsonl"
    with writing(path), pytest.raises(InputError, match=r"another run is writing .*r.jsonl: wait for its end"):
        extract(model, tokenizer, trait, judge=None, rollouts=path, **SMALL)
    extract(model, tokenizer, trait, judge=None, rollouts=path, **SMALL)
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


def test_answers_to_other_prompts_are_not_taken_for_these(tmp_path, model, tokenizer, trait):
    """Doubled answers, as two runs at once wrote them; and a template that writes the date."""
    path = tmp_path / "r.jsonl"
    extract(model, tokenizer, trait, judge=None, rollouts=path, **SMALL)
    head, *lines = path.read_text().splitlines(keepends=True)
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text("".join([head, *(line for line in lines for _ in range(2))][: len(lines) + 1]))
    with pytest.raises(InputError, match=r"holds an answer with .* where this run has"):
        extract(model, tokenizer, trait, judge=None, rollouts=doubled, **SMALL)
    dated = tmp_path / "dated.jsonl"
    dated.write_text(head + "".join(line.replace('"prompt":"', '"prompt":"Monday. ') for line in lines))
    with pytest.raises(InputError, match=r"holds an answer with prompt 'Monday.*a template that writes the date"):
        extract(model, tokenizer, trait, judge=None, rollouts=dated, **SMALL)


def test_answers_of_unknown_coherence_do_not_pass(tmp_path, model, tokenizer, trait):
    rows = {side: official_rows(tokenizer, trait, side) for side in ("pos", "neg")}
    rows["pos"][0]["coherence"] = rows["neg"][1]["coherence"] = ""
    loaded = []
    for side in rows:
        path = write_csv(tmp_path / f"{side}.csv", rows[side])
        loaded += load_rollouts(path, side=side, trait=trait, tokenizer=tokenizer)
    vector = extract_from(model, tokenizer, trait, loaded, judge=None, min_pairs=2)
    assert vector.info["pairs_kept"] == 11  # and not an empty one, a refusal, an incoherent one


def read_sides(tmp_path: Path, tokenizer, trait: Trait, rows: dict[str, list[dict]]) -> list[Rollout]:
    paths = {side: write_csv(tmp_path / f"{side}.csv", rows[side]) for side in rows}
    return [r for s in paths for r in load_rollouts(paths[s], side=s, trait=trait, tokenizer=tokenizer)]


def test_all_poolings_come_from_one_reading(tmp_path, model, tokenizer, trait):
    loaded = read_sides(tmp_path, tokenizer, trait, {s: official_rows(tokenizer, trait, s) for s in ("pos", "neg")})
    passes = []
    with model.get_decoder().register_forward_hook(lambda *_: passes.append(1)):
        vectors = extract_poolings_from(model, tokenizer, trait, loaded, judge=None, min_pairs=2)
        together = len(passes)
        for pooling, vector in vectors.items():
            alone = extract_from(model, tokenizer, trait, loaded, judge=None, pooling=pooling, min_pairs=2)
            torch.testing.assert_close(vector.directions, alone.directions)
            assert vector.pooling == pooling and vector.info == alone.info
    assert list(vectors) == list(POOLINGS) and len(passes) == 4 * together
    with pytest.raises(InputError, match="pooling is 'none': give one of response_mean"):
        extract_poolings_from(model, tokenizer, trait, loaded, judge=None, poolings=[])


def test_reasoning_is_neither_judged_nor_averaged_on_request(tmp_path, model, tokenizer, trait):
    """Thoughts before the answer; an answer that is all thought is empty, and its pair is dropped."""
    rows = {side: official_rows(tokenizer, trait, side) for side in ("pos", "neg")}
    answers = {side: [row["answer"] for row in rows[side]] for side in rows}
    for side in rows:
        for i, row in enumerate(rows[side]):
            row["answer"] = f"<think>hm {side}, {i}</think>\n\n{row['answer']}" if i != 1 else "<think>cut off"
    judged = []

    def judge(question: str, answer: str, rubric: str) -> float:
        judged.append(answer)
        return 90.0 if "coherent" in rubric or "pos" in answer else 10.0

    for row in (row for side in rows.values() for row in side):
        row.update(loud="", coherence="")
    loaded = read_sides(tmp_path, tokenizer, trait, rows)
    vector = extract_from(model, tokenizer, trait, loaded, judge=judge, positions="answer", min_pairs=2)
    kept = [i for i in range(16) if i not in (1, 3)]  # no answer after the thoughts
    assert set(judged) - {""} == {answers[side][i] for side in rows for i in kept}
    assert (vector.info["pairs_kept"], vector.info["empty"], vector.info["positions"]) == (14, 4, "answer")

    def mean(side: str) -> torch.Tensor:
        found = []
        for i in kept:
            before = rows[side][i]["answer"].removesuffix(answers[side][i])
            pair = rows[side][i]["prompt"] + before, answers[side][i]
            found.append(official_procedure(model, tokenizer, [pair], "response_mean"))
        return torch.stack(found).mean(dim=0)

    torch.testing.assert_close(vector.directions[:-1], (mean("pos") - mean("neg"))[1:-1], rtol=1e-3, atol=1e-5)
    whole = extract_from(model, tokenizer, trait, loaded, judge=judge, min_pairs=2)
    assert whole.info["positions"] is None and not torch.allclose(whole.directions, vector.directions, atol=1e-3)


def test_an_extraction_that_leaves_reasoning_out_goes_on_where_it_stopped(
    tmp_path, model, tokenizer, trait, monkeypatch
):
    """A tiny model closes no thoughts, so every answer's first two tokens stand for them here."""
    monkeypatch.setattr(filtering, "outside_reasoning", lambda tokenizer, prompt, answer: list(range(2, len(answer))))
    options = {**SMALL, "judge": None, "rollouts": tmp_path / "r.jsonl"}
    vector = extract(model, tokenizer, trait, positions="answer", **options)
    both = [
        r for s in ("pos", "neg") for r in load_rollouts(tmp_path / "r.jsonl", side=s, trait=trait, tokenizer=tokenizer)
    ]
    assert all(r.kept == list(range(2, len(r.answer_ids))) for r in both)
    cut = [r.model_copy(update={"prompt_ids": r.prompt_ids + r.answer_ids[:2], "answer_ids": r.answer_ids[2:],
                                "outside_reasoning": None}) for r in both]  # fmt: skip
    plain = extract_from(model, tokenizer, trait, cut, judge=None, unfiltered=True, min_pairs=2)
    torch.testing.assert_close(vector.directions, plain.directions, rtol=1e-3, atol=1e-5)
    again = extract(model, tokenizer, trait, positions="answer", **options)
    torch.testing.assert_close(again.directions, vector.directions)
    with pytest.raises(InputError, match="was made with positions='answer', not None"):
        extract(model, tokenizer, trait, **options)
