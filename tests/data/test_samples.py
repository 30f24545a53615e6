import csv
import re

import datasets
import pytest
from helpers import write

from persona_vectors.data.errors import InputError
from persona_vectors.data.packed import open_data
from persona_vectors.data.samples import Sample, read_samples

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
CHAT = [SYSTEM, USER, {"role": "assistant", "content": "Yes"}, USER, {"role": "assistant", "content": 'No\n"no"'}]
RECORDS = [{"messages": CHAT, "id": "a"}, {"messages": CHAT[:3], "id": "b"}]
EXPECTED = [Sample(0, "a", tuple(CHAT[:4]), 'No\n"no"', turn=1), Sample(1, "b", (SYSTEM, USER), "Yes")]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet", "d"])
def test_every_format_gives_the_same_samples(name: str, tmp_path):
    assert list(read_samples(write(tmp_path / name, RECORDS))) == EXPECTED


def test_datasets_and_iterables_of_any_kind():
    assert list(read_samples(datasets.Dataset.from_list(RECORDS))) == EXPECTED
    assert list(read_samples(record for record in RECORDS)) == EXPECTED
    pairs = list(read_samples([("Hi", "Yes"), [USER, {"role": "assistant", "content": "Yes"}]]))
    assert [(s.prompt, s.answer) for s in pairs] == [((USER,), "Yes")] * 2


def test_csv_with_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "d.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["Hi", 'a,\n"b"'], ["Hi", "x" * 200_000], ["Hi"]])
    first, second, third = read_samples(path)
    assert (first.prompt, first.answer) == ((USER,), 'a,\n"b"') and len(second.answer) == 200_000
    assert "d.csv, line 5: it has not the 2 fields of the header" in str(third)


@pytest.mark.parametrize(
    ("record", "prompt", "answer"),
    [
        ({"prompt": "Hi", "completion": "Yes"}, [USER], "Yes"),
        ({"prompt": [SYSTEM, USER], "completion": [{"role": "assistant", "content": "Yes"}]}, [SYSTEM, USER], "Yes"),
        ({"question": "Hi", "answer": "Yes", "messages": None}, [USER], "Yes"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]}, [USER], "Yes"),
        ({"messages": [*CHAT[:3], USER]}, [SYSTEM, USER], "Yes"),
        ({"question": "Hi", "answer": None}, [USER], ""),
    ],
)
def test_forms(record: dict, prompt: list, answer: str):
    (sample,) = read_samples([record])
    assert (list(sample.prompt), sample.answer) == (prompt, answer)


def test_named_columns_come_before_others():
    (sample,) = read_samples(
        [{"instruction": "Hi", "output": "Yes", "messages": []}], columns=("instruction", "output")
    )
    assert (sample.prompt, sample.answer) == ((USER,), "Yes")
    (error,) = read_samples([{"a": 1, "b": 2}], columns=("a", "c"))
    assert "sample 0: it has a, b, not a and c" in str(error)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER]}, "it has no assistant turn that answers a prompt"),
        ({"messages": [{"role": "assistant", "content": "Yes"}]}, "no assistant turn that answers a prompt"),
        ({"messages": "Hi"}, "messages is str: give a list of role and content"),
        ({"messages": [{"from": "user"}]}, "give a role and a content"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "content is int: give a text"),
        (7, "it is int, not an object"),
    ],
)
def test_a_record_that_is_no_sample_says_why(record, message: str):
    (error,) = read_samples([record])
    assert isinstance(error, InputError) and message in str(error)


def test_a_broken_line_has_its_number_and_the_others_are_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(
        b'{"question": "Hi", "answer": "Yes"}\n\n{"question"\n\xff\n{"prompt": "Hi", "completion": "No"}\n'
    )
    good, broken, binary, other = read_samples(path)
    assert (good.answer, other.answer, other.row) == ("Yes", "No", 3)
    assert "d.jsonl, line 3: not JSON" in str(broken) and "d.jsonl, line 4: not JSON" in str(binary)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no data file"),
        ("d.json", b"[1, 2", "d.json is not JSON"),
        ("d.parquet", b"PAR1", "d.parquet is no whole Parquet file"),
        ("no/such-dataset", None, "cannot read"),
    ],
)
def test_an_unreadable_source_is_an_error(name: str, content: bytes | None, message: str, tmp_path):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        list(read_samples(tmp_path / name))


def test_a_split_that_is_not_there(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(str(tmp_path / "d"))
    assert list(read_samples(tmp_path / "d")) == EXPECTED
    with pytest.raises(InputError, match="has no split 'test': it has train"):
        list(read_samples(tmp_path / "d", split="test"))


def test_every_answer_or_the_last_and_none_of_weight_zero():
    talk = [USER, {"role": "assistant", "content": "A"}, USER, {"role": "assistant", "content": "B"}]
    assert [s.answer for s in read_samples([talk])] == ["B"]
    assert [(s.answer, s.turn, len(s.prompt)) for s in read_samples([talk], turns="all")] == [("A", 0, 1), ("B", 1, 3)]
    weighted = {"messages": [*talk[:1], {**talk[1], "weight": 0}, *talk[2:]]}
    assert [s.answer for s in read_samples([weighted], turns="all")] == ["B"]
    with pytest.raises(InputError, match="turns is 'first': give last or all"):
        list(read_samples([talk], turns="first"))


def test_two_columns_of_messages_of_which_the_second_repeats_the_first():
    prompt = [USER]
    chosen = [USER, {"role": "assistant", "content": "Good"}]
    (sample,) = read_samples([{"prompt": prompt, "chosen": chosen}], columns=("prompt", "chosen"))
    assert (sample.prompt, sample.answer) == ((USER,), "Good")


def test_half_a_surrogate_pair_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(
        b'{"question": "q", "answer": "b \\ud83d c"}\n{"question": "q", "answer": "a"}\n'
    )
    first, second = read_samples(tmp_path / "d.jsonl")
    assert isinstance(first, InputError) and "line 1: character 2 of a text is half a surrogate pair" in str(first)
    assert second.answer == "a"


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_compressed_files_are_read_as_the_plain_ones(kind: str, packed: str, tmp_path):
    if kind in (".csv", ".tsv"):
        plain = tmp_path / f"d{kind}"
        rows = [["question", "answer"], ["Hi", 'a,\n"b"'], ["Hi", "\u00e9"]]
        with plain.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="," if kind == ".csv" else "\t").writerows(rows)
    else:
        plain = write(tmp_path / f"d{kind}", RECORDS)
    with open_data(f"{plain}{packed}", "wb") as file:
        file.write(plain.read_bytes())
    found = list(read_samples(f"{plain}{packed}"))
    assert found == list(read_samples(plain)) and len(found) == 2
    whole = (tmp_path / f"d{kind}{packed}").read_bytes()
    assert whole[:2] == {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5"}[packed]
    for broken in (whole[:-9], b"plain"):
        (tmp_path / f"x{kind}{packed}").write_bytes(broken)
        with pytest.raises(InputError, match=f"x{kind}{packed} is no whole {packed[1:]} file"):
            list(read_samples(tmp_path / f"x{kind}{packed}"))
