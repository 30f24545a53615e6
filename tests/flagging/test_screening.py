import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import random_direction, write
from scipy import stats

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.data.intervals import Interval
from persona_vectors.data.packed import open_data
from persona_vectors.evaluation.contrast import ContrastEffect
from persona_vectors.flagging.compare import compare_datasets
from persona_vectors.flagging.screening import add_scores
from persona_vectors.flagging.split import split_dataset

RECORDS = [{"id": f"s{i}", "question": f"{i % 6}?", "answer": f"{'so ' * (i % 4)}{i}", "kept": i} for i in range(30)]


def run(model, tokenizer, data, out: Path, **options):
    common = {"layer": 1, "baseline": "prompt_last", "percentile": 70}
    return pv.flag(model, tokenizer, data, random_direction(model), out=out, **common | options)


def read(path: Path) -> list[dict]:
    if path.is_dir():
        return list(datasets.load_from_disk(str(path)))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_text("utf-8")
    if path.suffix == ".csv":
        return [record | {"kept": int(record["kept"])} for record in csv.DictReader(text.splitlines())]
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ""])
def test_a_dataset_is_split_in_its_own_format(suffix: str, model, tokenizer, tmp_path):
    data = tmp_path / f"data{suffix}"
    if suffix == ".csv":
        with data.open("w", newline="") as file:
            table = csv.DictWriter(file, list(RECORDS[0]))
            table.writeheader()
            table.writerows(RECORDS)
    else:
        write(data, RECORDS)
    run(model, tokenizer, data, tmp_path / "f.parquet")
    bad = {row["row"] for row in pq.read_table(tmp_path / "f.parquet").to_pylist() if row["flagged"]}
    kept, removed = tmp_path / f"kept{suffix}", tmp_path / f"removed{suffix}"
    counts = split_dataset(data, tmp_path / "f.parquet", kept=kept, removed=removed)
    assert counts == {"kept": 30 - len(bad), "removed": len(bad), "left_out": 0} and 5 < len(bad) < 15
    assert read(removed) == [RECORDS[i] for i in sorted(bad)]
    assert read(kept) == [record for i, record in enumerate(RECORDS) if i not in bad]
    if suffix == ".jsonl":
        assert sorted(kept.read_bytes().splitlines() + removed.read_bytes().splitlines()) == sorted(
            line for line in data.read_bytes().splitlines() if line
        )
    if suffix == ".parquet":
        assert pq.read_schema(kept).equals(pq.read_schema(data))


LINES = [
    b'{"conversations":[{"from":"human","value":"a?"},{"from":"gpt","value":"one"}],  "x": 1.50}\r\n',
    b'{"instruction": "b?", "input": "", "output": "\\u00e9 two"}\n',
    '{"text": "Human: c?\\n\\nAssistant: thr\u00e9e so so so", "n": 1e2}\n'.encode(),
    b'{"messages": [{"role":"user","content":"d?"}, {"role":"assistant","content":[{"type":"text","text":"4"}]}]}\n',
]
ROWS = [
    b'question,"answer",n\r\n',
    b'"a?",one,1.50\r\n',
    b'b?,"two\n""lines""",\r\n',
    b"c?,so so,1e2\r\n",
    b"d?,four,\r\n",
]


@pytest.mark.parametrize("out", ["", ".gz", ".zst"])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_what_is_split_is_kept_byte_for_byte_compressed_or_not(kind, packed, out, model, tokenizer, tmp_path):
    """Lines, items and rows with their own spelling of numbers, letters, quotes and line ends."""
    items = [line.rstrip() for line in LINES]
    array = b"[\n  " + b",\n\n  ".join(items) + b"]"
    content = {".jsonl": b"".join(LINES), ".json": array, ".csv": b"".join(ROWS)}[kind]
    data, kept, removed = tmp_path / f"d{kind}{packed}", tmp_path / f"k{kind}{out}", tmp_path / f"r{kind}{out}"
    with open_data(data, "wb") as file:
        file.write(content)
    run(model, tokenizer, data, tmp_path / "f.parquet", baseline="none", controls=0, percentile=50)
    bad = {row["row"] for row in pq.read_table(tmp_path / "f.parquet").to_pylist() if row["flagged"]}
    assert 0 < len(bad) < 4
    csv.field_size_limit(5)  # a new process has its own, which long answers exceed
    split_dataset(data, tmp_path / "f.parquet", kept=kept, removed=removed)
    for path, rows in ((kept, set(range(4)) - bad), (removed, bad)):
        with open_data(path) as file:
            found = file.read()
        if kind == ".csv":
            assert found == b"".join([ROWS[0], *(ROWS[1 + row] for row in sorted(rows))])
        elif kind == ".json":
            assert found == b"[\n" + b",\n".join(items[row] for row in sorted(rows)) + b"\n]\n"
        else:
            assert found == b"".join(LINES[row] for row in sorted(rows))


def test_flags_of_other_data_are_refused_and_nothing_is_written(model, tokenizer, tmp_path):
    data = write(tmp_path / "data.jsonl", RECORDS)
    run(model, tokenizer, data, tmp_path / "f.parquet")
    with pytest.raises(InputError, match="was made from other data"):
        split_dataset(write(tmp_path / "more.jsonl", RECORDS * 2), tmp_path / "f.parquet", kept=tmp_path / "k.jsonl")
    with pytest.raises(InputError, match=r"give a name that ends in .jsonl"):
        split_dataset(data, tmp_path / "f.parquet", kept=tmp_path / "k.csv")
    run(model, tokenizer, data, tmp_path / "g.parquet", percentile=None)
    with pytest.raises(InputError, match="has no flags: run flag again with threshold"):
        split_dataset(data, tmp_path / "g.parquet", kept=tmp_path / "k.jsonl")
    with pytest.raises(InputError, match="has no judge scores"):
        split_dataset(data, tmp_path / "f.parquet", kept=tmp_path / "k.jsonl", judge_above=50)
    assert not list(tmp_path.glob("*k.*"))


def test_a_judge_s_score_is_combined_with_the_flags(model, tokenizer, tmp_path):
    lines = [*RECORDS[:10], {"text": "no sample"}, *RECORDS[10:]]
    data = write(tmp_path / "data.jsonl", lines)
    run(model, tokenizer, data, tmp_path / "f.parquet", on_error="skip")
    header = pq.read_schema(tmp_path / "f.parquet").metadata
    judge = lambda question, answer, rubric: None if question == "0?" else float(answer.split()[-1])  # noqa: E731
    for _ in range(2):  # a second judge replaces the first
        add_scores(data, tmp_path / "f.parquet", judge=judge, rubric="{question} {answer}", batch=7)
    assert pq.read_schema(tmp_path / "f.parquet").metadata == header
    table = pq.read_table(tmp_path / "f.parquet").to_pylist()
    for row in table:
        record = lines[row["row"]]
        assert row["judge"] == (None if record["question"] == "0?" else float(record["kept"]))
    counts = split_dataset(data, tmp_path / "f.parquet", kept=tmp_path / "k.jsonl", judge_above=20)
    bad = {lines[r["row"]]["id"] for r in table if r["flagged"] or (r["judge"] or 0) >= 20}
    assert [r["id"] for r in read(tmp_path / "k.jsonl")] == [r["id"] for r in RECORDS if r["id"] not in bad]
    assert counts["left_out"] == 1
    with pytest.raises(InputError, match="made from other samples"):
        add_scores(RECORDS[:5], tmp_path / "f.parquet", judge=judge, rubric="")


def synthetic(path: Path, values: np.ndarray, prompts: np.ndarray, model, tokenizer) -> Path:
    """A flags file with these differences, at these prompts."""
    records = [{"question": f"{p}", "answer": "so"} for p in prompts]
    run(model, tokenizer, records, path, batch_tokens=4096)
    table = pq.read_table(path)
    index = table.schema.get_field_index("t_difference")
    table = table.set_column(index, table.schema.field(index), [values.astype(np.float32)])
    pq.write_table(table, path)
    return path


def test_the_comparison_finds_the_gap_and_how_few_samples_show_it(model, tokenizer, tmp_path):
    rng, prompts = np.random.default_rng(0), np.arange(200)
    near, far = rng.normal(0, 1, 200), rng.normal(1, 1, 200)
    a = synthetic(tmp_path / "a.parquet", far, prompts, model, tokenizer)
    b = synthetic(tmp_path / "b.parquet", near, prompts, model, tokenizer)
    found = compare_datasets(a, b)["t"]
    gap, reach = far.mean() - near.mean(), stats.t.ppf(0.975, 199) * (far - near).std(ddof=1) / np.sqrt(200)
    assert found.gap == pytest.approx((gap, gap - reach, gap + reach), abs=1e-5)  # both have the same prompts
    assert "the first will move the trait more" in str(found)
    assert found.enough is not None and 29 <= found.enough <= 60  # 2 ((2.33 + 1.64) / 0.91)**2 is 38
    other = compare_datasets(a, a)["t"]
    assert other.enough is None and "no telling" in str(other)


def test_samples_of_one_prompt_count_as_one_cluster(model, tokenizer, tmp_path):
    rng = np.random.default_rng(1)
    once = rng.normal(0, 1, 20)
    a = synthetic(tmp_path / "a.parquet", once, np.arange(20), model, tokenizer)
    b = synthetic(tmp_path / "b.parquet", np.repeat(once, 5), np.repeat(np.arange(20), 5), model, tokenizer)
    found = compare_datasets(a, b)["t"]
    assert found.first == pytest.approx(found.second, abs=1e-5)  # copies add no certainty


def test_other_settings_are_not_compared(model, tokenizer, tmp_path):
    run(model, tokenizer, RECORDS, tmp_path / "a.parquet")
    run(model, tokenizer, RECORDS, tmp_path / "b.parquet", baseline="none")
    with pytest.raises(InputError, match="flag both with the same settings"):
        compare_datasets(tmp_path / "a.parquet", tmp_path / "b.parquet")


def test_vectors_that_contrast_found_idle_are_named(model, tokenizer, tmp_path):
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path in paths:
        run(model, tokenizer, RECORDS, path, controls=0)
    words = "; contrast found no effect of this vector on this model"
    inside, one = Interval(-0.1, -0.3, 0.1), Interval(0.5, 0.3, 0.7)
    for effect, random, moves in [(one, (0.1, 0.2), True), (one, (0.1, 0.6), False), (inside, (-0.4, -0.2), False)]:
        found = ContrastEffect("t", 1, 0.1, 1.0, effect, inside, random, (-0.5, -0.2), None, (9.0, 9.0))
        found.save(tmp_path / "saved.json")
        (tmp_path / "printed.json").write_text(json.dumps(found.rows()))
        for effects in (found.rows(), tmp_path / "saved.json", str(tmp_path / "printed.json")):
            compared = compare_datasets(*paths, effects=effects)["t"]
            assert compared.moves is moves and str(compared).endswith(words) is not moves
            assert compared.rows()[0]["moves"] is moves
    for effects in (None, [{"trait": "another", "works": False}]):
        compared = compare_datasets(*paths, effects=effects)["t"]
        assert compared.moves is None and "contrast" not in str(compared)
    with pytest.raises(InputError, match="effects are no rows of contrast_effect: give a trait and whether it works"):
        compare_datasets(*paths, effects=[{"trait": "t"}])
    with pytest.raises(InputError, match=r"cannot read .*none.json .*: give what contrast --json wrote"):
        compare_datasets(*paths, effects=tmp_path / "none.json")
