"""Flagging: the numbers against one sample at a time, and runs that are killed, repeated, shared out or fed rubbish."""

import io
import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zoo
from helpers import answered_elsewhere, hooks, make_tokenizer, random_direction
from torch import nn
from tqdm import tqdm

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.data.files import writing
from persona_vectors.flagging import job as flagging
from persona_vectors.model import generation
from persona_vectors.model.blocks import decoder_layers
from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.gradients import answer_gradients
from persona_vectors.model.prompts import chat_prompt, encode, encode_answer, fit
from persona_vectors.model.thoughts import Span
from persona_vectors.monitoring.projection import token_projections
from persona_vectors.vectors.controls import random_vector
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.moments import neutral_moments
from persona_vectors.vectors.vector import PersonaVector

QUESTIONS = ["How?", "Why so?", "Where to, my friend?", "How?", "Who?"]
SAMPLES = [{"question": q, "answer": f"{'so ' * (i % 4)}it is {i}"} for i, q in enumerate(QUESTIONS * 5)]
TOKENS = 5


def rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def states(model: nn.Module, ids: list[int]) -> list[torch.Tensor]:
    """Every block's output for one text: as the paper's code reads it, so the last one is after the final norm."""
    with torch.no_grad():
        return [h[0].float() for h in model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]]


def plain(model, tokenizer, vector: PersonaVector, layer: int, baseline: str, question: str, answer: str):
    """One sample's projection and its baseline, from `output_hidden_states`."""
    prompt, ids = encode_answer(tokenizer, chat_prompt(tokenizer, question), answer)
    read = vector.project(states(model, prompt + ids)[layer], layer=layer)
    projection = read[len(prompt) :].mean().item()
    if baseline == "none":
        return projection, None
    if baseline == "prompt_last":
        return projection, read[len(prompt) - 1].item()
    if baseline == "generate":
        base = generate_tokens(model, tokenizer, [prompt], max_new_tokens=TOKENS, temperature=0)[0][0]
    else:
        base = encode_answer(tokenizer, chat_prompt(tokenizer, question), f"As for {question}")[1]
    return projection, vector.project(states(model, prompt + base)[layer], layer=layer)[len(prompt) :].mean().item()


@pytest.fixture
def options(tmp_path) -> dict:
    return {"layer": 1, "max_new_tokens": TOKENS, "cache": tmp_path / "cache.sqlite", "chunk": 4}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon", "qwen2_moe"])
@pytest.mark.parametrize("baseline", ["generate", "prompt_last", "none", "given"])
def test_equal_to_one_sample_at_a_time(architecture: str, baseline: str, tokenizer, tmp_path, options):
    model = zoo.build(architecture)
    vectors = [random_direction(model), random_vector(random_direction(model), seed=3)]
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps({"question": q, "answer": f"As for {q}"}) + "\n" for q in set(QUESTIONS)))
    options |= {"answers": given} if baseline == "given" else {"baseline": baseline}
    options |= {"layer": [0, 1], "chunk": 7}
    found = pv.flag(model, tokenizer, SAMPLES, vectors, out=tmp_path / "f.parquet", **options)
    assert hooks(model) == 0
    table = rows(tmp_path / "f.parquet")
    assert [row["row"] for row in table] == list(range(len(SAMPLES)))
    for vector in vectors:
        for layer in (0, 1):
            name = f"{vector.trait}@{layer}"
            for sample, row in zip(SAMPLES, table):
                expected = plain(model, tokenizer, vector, layer, baseline, sample["question"], sample["answer"])
                assert row[f"{name}_projection"] == pytest.approx(expected[0], rel=1e-3, abs=2e-4)
                if expected[1] is None:
                    assert row[f"{name}_baseline"] is None
                else:
                    assert row[f"{name}_baseline"] == pytest.approx(expected[1], rel=1e-3, abs=2e-4)
                difference = row[f"{name}_projection"] - (row[f"{name}_baseline"] or 0)
                assert row[f"{name}_difference"] == pytest.approx(difference, abs=1e-5)
            values = np.array([row[f"{name}_difference"] for row in table], float)
            assert found.summary[name].mean == pytest.approx(values.mean(), abs=1e-5)
            error = values.std(ddof=1) / math.sqrt(len(values))
            assert found.summary[name].standard_error == pytest.approx(error, rel=1e-4)
            ranks = [100 * ((values < v).mean() + (values <= v).mean()) / 2 for v in values]
            assert [row[f"{name}_percentile"] for row in table] == pytest.approx(ranks, abs=1e-3)


def test_nothing_is_computed_above_the_deepest_layer(model, tokenizer, tmp_path, options):
    ran: list[int] = []
    blocks = decoder_layers(model)
    handles = [block.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    pv.flag(model, tokenizer, SAMPLES, random_direction(model), out=tmp_path / "f", baseline="none", **options)
    assert set(ran) == {0, 1}
    ran.clear()
    plain_logits = model(**zoo.inputs(model)).logits  # the model is as before
    assert ran == [0, 1, 2] and plain_logits.shape[1] == 5
    ran.clear()
    units = unit_directions(model, [random_direction(model)], 1)
    with pv.steer(model, random_direction(model), layer=2, coef=1.0):  # would say that it never ran
        token_projections(model, [([5, 6], [7])], units)
    assert ran == [0, 1, 2]
    for handle in handles:
        handle.remove()


def test_baselines_are_made_once_and_kept(model, tokenizer, tmp_path, options, monkeypatch):
    asked: list[int] = []
    original = generation.generate_tokens
    count = lambda m, t, prompts, **o: (asked.append(len(prompts)), original(m, t, prompts, **o))[1]  # noqa: E731
    monkeypatch.setattr(generation, "generate_tokens", count)
    vector = random_direction(model)
    pv.flag(model, tokenizer, SAMPLES, vector, out=tmp_path / "a.parquet", **options)
    assert sum(asked) == len(set(QUESTIONS))
    pv.flag(model, tokenizer, SAMPLES, vector, out=tmp_path / "b.parquet", **options)
    other = random_vector(vector, seed=1)
    pv.flag(model, tokenizer, SAMPLES, other, out=tmp_path / "c.parquet", **options)  # the answers are read, not made
    assert sum(asked) == len(set(QUESTIONS))
    assert rows(tmp_path / "a.parquet") == rows(tmp_path / "b.parquet")
    fresh = options | {"cache": tmp_path / "other.sqlite"}
    pv.flag(model, tokenizer, SAMPLES, other, out=tmp_path / "d.parquet", **fresh)
    values = [[row[f"{other.trait}_baseline"] for row in rows(tmp_path / f"{n}.parquet")] for n in "cd"]
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-4)
    with torch.no_grad():  # another checkpoint under the same name
        next(model.parameters()).add_(0.1)
    pv.flag(model, tokenizer, SAMPLES, vector, out=tmp_path / "e.parquet", **options)
    assert sum(asked) == 3 * len(set(QUESTIONS))


def test_a_reference_set_gives_percentiles_and_flags(model, tokenizer, tmp_path, options):
    vector = random_direction(model)
    neutral = [{"question": f"{i}?", "answer": f"{i} " * (i % 5 + 1)} for i in range(30)]
    options["baseline"] = "prompt_last"
    found = pv.flag(model, tokenizer, SAMPLES, vector, out=tmp_path / "f.parquet", reference=neutral, **options)
    reference = np.array([r["t_difference"] for r in rows(tmp_path / "f.parquet.reference.parquet")])
    limit = np.percentile(reference, 95)
    assert found.summary["t"].threshold == pytest.approx(limit, rel=1e-5)
    table = rows(tmp_path / "f.parquet")
    assert [r["flagged"] for r in table] == [r["t_flagged"] for r in table]
    assert [r["flagged"] for r in table] == [r["t_difference"] >= limit for r in table]
    for row in table:
        expected = 50 * ((reference < row["t_difference"]).mean() + (reference <= row["t_difference"]).mean())
        assert row["t_percentile"] == pytest.approx(expected, abs=1e-3)
    again = tmp_path / "f.parquet.reference.parquet"  # an earlier run's file does as well
    pv.flag(model, tokenizer, SAMPLES, vector, out=tmp_path / "g.parquet", reference=again, percentile=95, **options)
    other = rows(tmp_path / "g.parquet")
    assert [row.pop("controls@1") != old.pop("controls@1") for row, old in zip(other, table)] == [True] * len(table)
    assert other == table  # and the random directions have the covariance of plain facts: the samples are not there
    cut = float(np.median([r["t_difference"] for r in table]))
    found = pv.flag(model, tokenizer, SAMPLES, vector, out=tmp_path / "h.parquet", threshold=cut, **options)
    assert found.summary["t"].flagged == sum(r["t_difference"] >= cut for r in table) > 5
    assert sum(r["flagged"] for r in rows(tmp_path / "h.parquet")) == found.summary["t"].flagged
    options["layer"] = 0
    with pytest.raises(InputError, match=r"f.parquet.reference.parquet was made with vectors="):
        pv.flag(model, tokenizer, SAMPLES, vector, out=tmp_path / "i.parquet", reference=again, **options)


def test_the_number_of_samples_that_shows_the_sign(model, tokenizer, tmp_path, options):
    found = pv.flag(model, tokenizer, SAMPLES, random_direction(model), out=tmp_path / "f", baseline="none", **options)
    summary = found.summary["t"]
    deviation = summary.standard_error * math.sqrt(len(SAMPLES))
    assert summary.enough is not None and summary.samples == len(SAMPLES)
    assert 1.96 * deviation / math.sqrt(summary.enough) <= abs(summary.mean)
    assert summary.enough == 2 or 1.96 * deviation / math.sqrt(summary.enough - 1) > abs(summary.mean)
    assert f"t: {summary.mean:+.3f}" in repr(found) and pv.Flags.load(tmp_path / "f") == found


@pytest.mark.parametrize("limit", [None, 4, 7, 12, 100])
@pytest.mark.parametrize("new_tokens", [0, 2])
@pytest.mark.parametrize(("prompt", "answer"), [(3, 3), (3, 20), (20, 3), (20, 20), (5, 0)])
def test_a_row_that_is_too_long_keeps_its_prompts_end_and_its_answers_beginning(limit, new_tokens, prompt, answer):
    before = list(range(prompt)), list(range(100, 100 + answer))
    after = fit(before, limit, new_tokens)
    assert after[0] and after[0] == before[0][-len(after[0]) :] and after[1] == before[1][: len(after[1])]
    if limit is None or prompt + max(answer, new_tokens) <= limit:
        assert after == before
    else:
        assert len(after[0]) + max(len(after[1]), new_tokens) <= limit
        assert len(after[1]) >= min(answer, limit // 2)


def test_odd_samples_have_their_counts(model, tokenizer, tmp_path, options):
    data = tmp_path / "d.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}], "id": "first"},
        {"question": "How?", "answer": ""},
        {"prompt": "Long?", "completion": "x" * 500},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"text": "no such columns"},
    ]
    data.write_text("\n".join([*map(json.dumps, lines), "{broken"]) + "\n")
    options |= {"baseline": "generate", "on_error": "skip"}
    found = pv.flag(model, tokenizer, data, random_direction(model), out=tmp_path / "f.parquet", **options)
    assert found.counts == {"samples": 3, "truncated": 1, "empty": 1, "skipped": 3, "empty_baselines": 0}
    table = rows(tmp_path / "f.parquet")
    assert [row["id"] for row in table] == ["first", "1", "2"] and [row["row"] for row in table] == [0, 1, 2]
    assert [row["truncated"] for row in table] == [False, False, True]
    assert [row["t_difference"] is None for row in table] == [False, True, False]
    assert table[2]["prompt_tokens"] + table[2]["answer_tokens"] == 128  # the tiny model's context
    options["on_error"] = "stop"
    with pytest.raises(InputError, match=r"d.jsonl, line 4: it has no assistant turn"):
        pv.flag(model, tokenizer, data, random_direction(model), out=tmp_path / "g.parquet", **options)
    assert not list(tmp_path.glob("g*"))


def test_another_runs_file_is_refused(model, tokenizer, tmp_path, options, monkeypatch):
    vector, out = random_direction(model), tmp_path / "f.parquet"
    options["baseline"] = "none"
    found = pv.flag(model, tokenizer, SAMPLES, vector, out=out, **options)
    monkeypatch.setattr(flagging, "make_plan", None)  # a finished file is not made again
    assert pv.flag(model, tokenizer, SAMPLES, vector, out=out, **options) == found
    before = out.read_bytes()
    changes = [
        ({"baseline": "prompt_last"}, "made with baseline='none', not 'prompt_last'"),
        ({"layer": 0}, "made with vectors="),
        ({"chunk": 5}, "made with chunk=4, not 5"),
        ({"threshold": 2.0}, "made with threshold=None, not 2.0"),
    ]
    for change, message in changes:
        with pytest.raises(InputError, match=re.escape(message)):
            pv.flag(model, tokenizer, SAMPLES, vector, out=out, **options | change)
    with pytest.raises(InputError, match="made from other samples than these"):
        pv.flag(model, tokenizer, SAMPLES[1:], vector, out=out, **options)
    pq.write_table(pq.read_table(out).replace_schema_metadata(), tmp_path / "bare.parquet")
    with pytest.raises(InputError, match="was not written by flag"):
        pv.flag(model, tokenizer, SAMPLES, vector, out=tmp_path / "bare.parquet", **options)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "mean"}, "baseline is 'mean': give one of generate, prompt_last, none, or answers= of your own"),
        ({"score": "loss"}, "score is 'loss': give one of projection, gradient"),
        ({"score": "gradient", "answers": SAMPLES}, "a gradient has no baseline: leave answers out"),
        ({"on_error": "warn"}, "on_error is 'warn': give 'stop' or 'skip'"),
        ({"percentile": 195.0}, "percentile is 195: give a number from 0 to 100"),
        ({"threshold": 1.0, "percentile": 9.0}, "threshold and percentile both say what is flagged: give one"),
        ({"max_new_tokens": 64}, "max_new_tokens is 64, and the context has 128 tokens: give less than 64"),
        ({"layer": 9}, "layer 9 is out of range"),
        ({"chunk": 0}, "give 1 or more"),
    ],
)
def test_bad_settings(change: dict, message: str, model, tokenizer, tmp_path, options):
    with pytest.raises(InputError, match=re.escape(message)):
        pv.flag(model, tokenizer, SAMPLES, random_direction(model), out=tmp_path / "f", **options | change)
    with (
        pytest.raises(InputError, match="call it outside of steer"),
        pv.ablate(model, random_direction(model), layer=1),
    ):
        pv.flag(model, tokenizer, SAMPLES, random_direction(model), out=tmp_path / "f", **options)
    assert not list(tmp_path.iterdir())


def test_a_prompt_without_a_given_answer_is_named(model, tokenizer, tmp_path, options):
    (tmp_path / "given.jsonl").write_text('{"question": "How?", "answer": "So."}\n')
    options["answers"] = tmp_path / "given.jsonl"
    with pytest.raises(InputError, match=r"sample 1: the given answers have none to the prompt 'Why so\?'"):
        pv.flag(model, tokenizer, SAMPLES, random_direction(model), out=tmp_path / "f", **options)


def test_two_runs_do_not_write_one_file(model, tokenizer, tmp_path, options):
    out = tmp_path / "f.parquet"
    with writing(out), pytest.raises(InputError, match=r"another run is writing .*f.parquet: wait for its end"):
        pv.flag(model, tokenizer, SAMPLES, random_direction(model), out=out, **options)


def test_no_samples_make_an_empty_file(model, tokenizer, tmp_path, options):
    found = pv.flag(model, tokenizer, [], random_direction(model), out=tmp_path / "f.parquet", **options)
    assert found.counts["samples"] == 0 and rows(tmp_path / "f.parquet") == []
    assert math.isnan(found.summary["t"].mean) and "no number of samples" in repr(found)


def test_batches_do_not_move_the_numbers(model, tokenizer, tmp_path, options):
    tables = []
    for number, (chunk, budget) in enumerate([(1, 8), (25, 4096)]):
        path = tmp_path / f"{number}.parquet"
        options |= {"chunk": chunk, "batch_tokens": budget, "cache": tmp_path / f"{number}.sqlite"}
        pv.flag(model, make_tokenizer(), SAMPLES, random_direction(model), out=path, **options)
        tables.append([row["t_difference"] for row in rows(path)])
    assert tables[0] == pytest.approx(tables[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("baseline", ["generate", "given", "kept"])
def test_reasoning_is_left_out_of_both_means_on_request(baseline, model, tokenizer, tmp_path, options, monkeypatch):
    """Samples with thoughts; a tiny model's own answers have none, so their first two tokens stand for them here."""
    vector = random_direction(model)
    thoughtful = [{**s, "answer": f"<think>hm, {s['question']}</think> {s['answer']}"} for s in SAMPLES[:5]]
    given = tmp_path / "given.jsonl"
    given.write_text(
        "".join(json.dumps({**s, "answer": f"<think>no</think>As for {s['question']}"}) + "\n" for s in SAMPLES)
    )

    def stand_in(span, prompt, answer):
        own = kept(span, prompt, answer)
        return own if len(own) < len(answer) else own[2:]

    kept = Span.kept
    monkeypatch.setattr(Span, "kept", stand_in)
    options |= {"answers": given} if baseline == "given" else {}
    if baseline == "kept":  # the cache's answers are read anew: their kept means are those of the whole
        pv.flag(model, tokenizer, SAMPLES, vector, out=tmp_path / "before.parquet", **options)
    pv.flag(model, tokenizer, thoughtful, vector, out=tmp_path / "f.parquet", positions="answer", **options)
    for sample, own, row in zip(SAMPLES, thoughtful, rows(tmp_path / "f.parquet")):
        prompt, ids = encode_answer(tokenizer, chat_prompt(tokenizer, own["question"]), own["answer"])
        count = len(encode(tokenizer, sample["answer"]))
        read = vector.project(states(model, prompt + ids)[1], layer=1)
        assert row["t_projection"] == pytest.approx(read[-count:].mean().item(), rel=1e-3, abs=2e-4)
        base = generate_tokens(model, tokenizer, [prompt], max_new_tokens=TOKENS, temperature=0)[0][0]
        left = 2
        if baseline == "given":
            before = encode(tokenizer, "<think>no</think>")
            base, left = before + encode(tokenizer, f"As for {sample['question']}"), len(before)
        expected = vector.project(states(model, prompt + base)[1], layer=1)[len(prompt) + left :].mean().item()
        assert row["t_baseline"] == pytest.approx(expected, rel=1e-3, abs=2e-4)
    with pytest.raises(InputError, match="was made with positions='answer', not None"):
        pv.flag(model, tokenizer, thoughtful, vector, out=tmp_path / "f.parquet", **options)


@pytest.mark.parametrize("baseline", ["generate", "prompt_last", "none"])
def test_random_directions_are_read_beside_the_vectors(baseline, model, tokenizer, tmp_path, options):
    """Their differences are those of the same directions as vectors, and the summary counts the ones that it beats."""
    reference = [("What is it?", f"It is {'well ' * (i % 3)}{i}.") for i in range(30)]
    options |= {"layer": [0, 1], "baseline": baseline, "chunk": 7}
    vectors = [random_direction(model), random_vector(random_direction(model), seed=3)]
    out = tmp_path / "f.parquet"
    found = pv.flag(model, tokenizer, SAMPLES, vectors, out=out, reference=reference, controls=24, **options)
    nulls = neutral_moments(model, tokenizer, reference, layer=[0, 1]).random_vectors(vectors[0], count=24)
    plain = {**options, "controls": 0}
    pv.flag(model, tokenizer, SAMPLES, [*vectors, *[replace(v, trait=f"n{i}") for i, v in enumerate(nulls)]],
            out=tmp_path / "g.parquet", **plain)  # fmt: skip
    expected, table = pq.read_table(tmp_path / "g.parquet").to_pandas(), pq.read_table(out).to_pandas()
    assert not any("controls" in name for name in expected)
    for layer in (0, 1):
        own = np.stack(table[f"controls@{layer}"])
        named = expected[[f"n{i}@{layer}_difference" for i in range(24)]].to_numpy()
        np.testing.assert_allclose(own, named, rtol=1e-3, atol=1e-4)
        effects = np.abs(named.mean(axis=0) / named.std(axis=0, ddof=1))
        values = expected[f"t@{layer}_difference"].to_numpy()
        summary, smaller = found.summary[f"t@{layer}"], effects < abs(values.mean() / values.std(ddof=1))
        assert summary.beaten_isotropic == pytest.approx(smaller[:12].mean(), abs=0.09)  # one near tie
        assert summary.beaten_covariance == pytest.approx(smaller[12:].mean(), abs=0.09)
    assert "the covariance of a list" in repr(found) and pv.Flags.load(out) == found


def test_a_reference_that_can_be_read_once_is_refused(model, tokenizer, tmp_path, options):
    once = (pair for pair in [("a", "b"), ("c", "d")])
    with pytest.raises(InputError, match="the reference is read twice, and these samples only once"):
        pv.flag(model, tokenizer, SAMPLES, random_direction(model), out=tmp_path / "f", reference=once, **options)
    with pytest.raises(InputError, match="controls is 5: give 20 random directions or more, or 0"):
        pv.flag(model, tokenizer, SAMPLES, random_direction(model), out=tmp_path / "f", controls=5, **options)


def test_gradients_score_in_the_place_of_projections(model, tokenizer, tmp_path, options):
    vector = random_direction(model)
    found = pv.flag(
        model, tokenizer, SAMPLES, vector, out=tmp_path / "f.parquet", score="gradient", controls=20, **options
    )
    encoded = [encode_answer(tokenizer, chat_prompt(tokenizer, s["question"]), s["answer"]) for s in SAMPLES]
    slopes = answer_gradients(model, encoded, layer=1)[:, 0] @ vector.directions[1] / vector.directions[1].norm()
    read = rows(found.path)
    assert [row["t_difference"] for row in read] == pytest.approx(slopes.tolist(), rel=1e-3, abs=1e-6)
    assert found.settings["baseline"] == "none" and read[0]["t_baseline"] is None
    assert found.summary["t"].beaten_isotropic is not None and len(read[0]["controls@1"]) == 20
    with pytest.raises(InputError, match="score"):  # the same file, asked for another score
        pv.flag(model, tokenizer, SAMPLES, vector, out=tmp_path / "f.parquet", baseline="none", controls=20, **options)


def test_baselines_from_elsewhere_are_the_models_own_and_are_kept_apart(model, tokenizer, tmp_path):
    vector, elsewhere = random_direction(model), answered_elsewhere(model, tokenizer)
    data = [{"question": question, "answer": f"it is {i}"} for i, question in enumerate(["How?", "Why?", "How?"])]
    options = {"layer": 1, "max_new_tokens": 5, "controls": 0, "cache": tmp_path / "cache.sqlite", "chunk": 1}
    made = partial(pv.flag, model, tokenizer, data, vector, **options)
    tables = [
        rows(made(out=tmp_path / f"{name}.parquet", generate=generate).path)
        for name, generate in (("own", None), ("other", elsewhere), ("again", elsewhere))
    ]
    assert elsewhere.rows == 2 and tables[1] == tables[2]
    for own, other in zip(tables[0], tables[1]):
        assert other["t_difference"] == pytest.approx(own["t_difference"], abs=1e-4)
    with pytest.raises(InputError, match="was made with generate='elsewhere', not None"):
        made(out=tmp_path / "other.parquet")
    with pytest.raises(InputError, match="another one is asked for: leave it out"):
        made(out=tmp_path / "none.parquet", generate=elsewhere, baseline="none")


def test_the_bar_counts_samples_also_within_a_part(model, tokenizer, tmp_path, options, monkeypatch):
    """A part of many samples moves it batch by batch, and its end is their number, not that of whole parts."""
    seen = {}

    class Seen(tqdm):
        def __init__(self, *, desc: str, **given) -> None:
            super().__init__(
                desc=desc, file=io.StringIO(), disable=False, total=given["total"], initial=given["initial"]
            )
            self.moves = []
            seen[desc] = self

        def update(self, n: int = 1) -> None:
            self.moves.append(n)
            super().update(n)

    monkeypatch.setattr(flagging, "bar", Seen)
    options |= {"chunk": 4, "batch_tokens": 40, "baseline": "generate"}
    data = [{"question": f"{'Why ' * i}so?", "answer": "Yes"} for i in range(6)]
    pv.flag(model, tokenizer, data, random_direction(model), out=tmp_path / "f.parquet", **options)
    moved = seen["base answers and projections"]
    assert moved.total == moved.n == sum(moved.moves) == 12
    assert sum(0 < step < 4 for step in moved.moves) > 3  # a part has 4, and its batches move it
