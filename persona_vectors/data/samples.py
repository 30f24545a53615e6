"""Training samples: read one after another from files, Hugging Face datasets or iterables, whatever their columns."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import import_pyarrow
from persona_vectors.data.formats import Message, conversation
from persona_vectors.data.labels import read_label
from persona_vectors.data.packed import data_suffix, open_data

Source = str | Path | Iterable[Any]
"""A .jsonl, .json, .csv or .tsv file (also .gz or .zst), a .parquet file, a dataset saved to disk, a Hub id ("name" or
"name:config"), or an iterable of records."""
FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Sample:
    """One training sample: what the model is given, and the answer that it would be trained on."""

    row: int
    """Its record's place in the dataset, from 0."""
    id: str
    """The record's own `id`, or its place."""
    prompt: tuple[Message, ...]
    """Chat messages before the answer."""
    answer: str
    turn: int = 0
    """Which of its conversation's answers it is, from 0."""
    label: bool | None = None
    """What its record says in the column that `labels` names."""
    calls: tuple[dict[str, Any], ...] = ()
    """The tools that the answer calls, after its text."""
    thought: str = ""
    """What the record gives as the answer's reasoning, beside its text."""

    @property
    def talk(self) -> list[Message]:
        """The prompt, and the answer as a message."""
        beside: dict[str, Any] = {"reasoning_content": self.thought} if self.thought else {}
        beside |= {"tool_calls": list(self.calls)} if self.calls else {}
        return [*self.prompt, {"role": "assistant", "content": self.answer, **beside}]


@dataclass(frozen=True)
class Talk:
    """One record's conversation, and which of its messages it trains on."""

    row: int
    id: str
    messages: tuple[Message, ...]
    answers: tuple[int, ...]
    """The places of the assistant's turns that follow something and have no `weight` of 0."""
    where: str
    label: bool | None = None

    def chosen(self, turns: str) -> tuple[int, ...]:
        """Return the places of "all" answers, or of the "last"."""
        if turns not in ("last", "all"):
            raise InputError(f"turns is {turns!r}: give last or all")
        return self.answers if turns == "all" else self.answers[-1:]


def read_samples(
    source: Source,
    *,
    columns: tuple[str, str] | None = None,
    split: str = "train",
    turns: str = "last",
    labels: str | None = None,
) -> Iterator[Sample | InputError]:
    """Yield a record's answers, the last or "all", or an InputError that says where and why it has none.

    The records are those of `read_talks`; never holds them all.
    """
    for talk in read_talks(source, columns=columns, split=split, labels=labels):
        if isinstance(talk, InputError):
            yield talk
            continue
        for place in talk.chosen(turns):
            answer, turn = talk.messages[place], talk.answers.index(place)
            beside = {"calls": tuple(answer.get("tool_calls", ())), "thought": answer.get("reasoning_content", "")}
            yield Sample(talk.row, talk.id, talk.messages[:place], answer["content"], turn, talk.label, **beside)


def read_talks(
    source: Source, *, columns: tuple[str, str] | None = None, split: str = "train", labels: str | None = None
) -> Iterator[Talk | InputError]:
    """Yield each record's conversation, or an InputError that says where and why it is none; never holds them all.

    A record holds `messages`, or ShareGPT's `conversations`; `prompt` and `completion` (texts, or lists of messages);
    `question` and `answer`; Alpaca's `instruction`, `input` and `output`; a rendered chat as `text`; or the two columns
    named in `columns`, of which one that is named twice holds the whole conversation, as a side of preference data may.
    Records may differ. A prompt that is a text is the user's turn; where the second of two lists repeats the first, it
    is the whole conversation. `tools` and `system` belong to any of them. In an iterable a record may also be a list
    of messages, or a pair of texts. The column `labels` holds a truth value, or nothing.

    Raises InputError where the source cannot be read at all, and for a label that is no truth value.
    """
    for row, (where, record) in enumerate(read_records(source, split=split)):
        try:
            if isinstance(record, InputError):
                raise record
            messages, ignored = conversation(record, columns)
            answers = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
            answers = [i for i in answers if i not in ignored]
            if not answers:
                raise InputError("it has no assistant turn that answers a prompt")
        except InputError as error:
            yield InputError(f"{where}: {error}")
        else:
            own = record.get("id") if isinstance(record, dict) else None
            label = None if labels is None else read_label(record, labels, where)
            yield Talk(row, str(row if own is None else own), tuple(messages), tuple(answers), where, label)


def read_records(source: Source, *, split: str = "train") -> Iterator[tuple[str, Any]]:
    """Yield each record of a source, with words that say where it stands; an InputError for one that is broken."""
    if not isinstance(source, (str, Path)):
        yield from ((f"sample {row}", record) for row, record in enumerate(source))
        return
    path, kind = Path(source), data_suffix(source)
    if kind not in FILES:
        records = enumerate(_hugging_face(source, split))
        yield from ((f"{source}, row {row}", record) for row, record in records)
        return
    if not path.is_file():
        raise InputError(f"no data file {path}: give {', '.join(FILES)} (or .gz, .zst), a dataset folder, or a Hub id")
    if kind == ".parquet":
        yield from ((f"{path}, row {row}", record) for row, record in enumerate(_parquet(path)))
    elif kind in (".csv", ".tsv"):
        yield from _csv(path, "," if kind == ".csv" else "\t")
    else:
        yield from _json(path)


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """Read a line at a time; only an array, which some .json files are, is read whole."""
    if is_array(path):
        try:
            with open_data(path) as file:
                items = json.loads(file.read())
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}): mend it, or give JSONL, a record a line") from None
        yield from ((f"{path}, item {row}", record) for row, record in enumerate(items))
        return
    with open_data(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    record = InputError(f"not JSON ({error})")
                yield f"{path}, line {number}", record


def is_array(path: Path) -> bool:
    """Say whether a JSON file is one array, not a record a line."""
    with open_data(path) as file:
        return next((line for line in map(bytes.strip, file) if line), b"").startswith(b"[")


def _csv(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default would refuse answers of more than 131,072 characters
    with open_data(path) as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
        try:
            for record in reader:
                whole = None not in record and None not in record.values()
                fault = InputError(f"it has not the {len(reader.fieldnames or ())} fields of the header")
                yield f"{path}, line {reader.line_num}", record if whole else fault
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}, line {reader.line_num + 1}: not CSV in UTF-8 ({error})") from None


def _parquet(path: Path) -> Iterator[Any]:
    pa, parquet = import_pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is no whole Parquet file ({error}): write it again") from None


def _hugging_face(source: str | Path, split: str) -> Iterable[Any]:
    try:
        from datasets import DatasetDict, load_dataset, load_from_disk
    except ImportError:
        raise InputError("this needs the datasets package: pip install 'persona-vectors-toolkit[data]'") from None
    folder = Path(source)
    try:
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = load_from_disk(str(folder))
            if isinstance(found, DatasetDict):
                if split not in found:
                    raise InputError(f"{source} has no split {split!r}: it has {', '.join(map(str, found))}")
                found = found[split]
            return found
        name, _, config = str(source).partition(":")
        return load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"cannot read {str(source)!r}: {reason} (give {', '.join(FILES)}, a dataset folder, or a Hub id)"
        ) from None
