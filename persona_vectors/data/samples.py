"""Training samples: read one after another from files, Hugging Face datasets or iterables, whatever their columns."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_vectors.data.checks import check_text
from persona_vectors.data.errors import InputError
from persona_vectors.data.files import import_pyarrow
from persona_vectors.data.labels import read_label

Source = str | Path | Iterable[Any]
"""A .jsonl, .json, .csv, .tsv or .parquet file, a dataset saved to disk, a Hub id ("name" or "name:config"), or an
iterable of records."""
FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_FORMS = "messages, prompt and completion, or question and answer"


@dataclass(frozen=True)
class Sample:
    """One training sample: what the model is given, and the answer that it would be trained on."""

    row: int
    """Its record's place in the dataset, from 0."""
    id: str
    """The record's own `id`, or its place."""
    prompt: tuple[dict[str, str], ...]
    """Chat messages before the answer."""
    answer: str
    turn: int = 0
    """Which of its conversation's answers it is, from 0."""
    label: bool | None = None
    """What its record says in the column that `labels` names."""


@dataclass(frozen=True)
class Talk:
    """One record's conversation, and which of its messages it trains on."""

    row: int
    id: str
    messages: tuple[dict[str, str], ...]
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
            answer = talk.messages[place]["content"]
            yield Sample(talk.row, talk.id, talk.messages[:place], answer, talk.answers.index(place), talk.label)


def read_talks(
    source: Source, *, columns: tuple[str, str] | None = None, split: str = "train", labels: str | None = None
) -> Iterator[Talk | InputError]:
    """Yield each record's conversation, or an InputError that says where and why it is none; never holds them all.

    A record holds `messages`, `prompt` and `completion` (texts, or lists of messages), `question` and `answer`, or the
    two named in `columns`; records may differ. A prompt that is a text is the user's turn; where the second of two
    lists repeats the first, it is the whole conversation. In an iterable a record may also be a list of messages, or a
    pair of texts. The column `labels` holds a truth value, or nothing.

    Raises InputError where the source cannot be read at all, and for a label that is no truth value.
    """
    for row, (where, record) in enumerate(read_records(source, split=split)):
        try:
            if isinstance(record, InputError):
                raise record
            messages, ignored = _conversation(record, columns)
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
    path, kind = Path(source), Path(source).suffix.lower()
    if kind == ".gz" and path.is_file():
        raise InputError(f"{path} is packed: unpack it first (gunzip {path.name})")
    if kind not in FILES:
        records = enumerate(_hugging_face(source, split))
        yield from ((f"{source}, row {row}", record) for row, record in records)
        return
    if not path.is_file():
        raise InputError(f"no data file {path}: give {', '.join(FILES)}, a dataset folder, or a Hub id")
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
            items = json.loads(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}): mend it, or give JSONL, a record a line") from None
        yield from ((f"{path}, item {row}", record) for row, record in enumerate(items))
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    record = InputError(f"not JSON ({error})")
                yield f"{path}, line {number}", record


def is_array(path: Path) -> bool:
    """Say whether a JSON file is one array, not a record a line."""
    with path.open("rb") as file:
        return next((line for line in map(bytes.strip, file) if line), b"").startswith(b"[")


def _csv(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default would refuse answers of more than 131,072 characters
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
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


def _conversation(record: Any, columns: tuple[str, str] | None) -> tuple[list[dict[str, str]], set[int]]:
    """Return a record's messages, and the places of those that it does not train on."""
    if isinstance(record, (list, tuple)):
        pair = len(record) == 2 and all(isinstance(item, str) for item in record)
        record = {"question": record[0], "answer": record[1]} if pair else {"messages": record}
    if not isinstance(record, dict):
        raise InputError(f"it is {type(record).__name__}, not an object: give {_FORMS}")
    if columns is None and record.get("messages") is not None:
        return _messages(record["messages"]), _unweighted(record["messages"])
    for first, second in [columns] if columns else [("prompt", "completion"), ("question", "answer")]:
        if first in record and second in record:
            before, after = _messages(record[first], "user"), _messages(record[second], "assistant")
            if isinstance(record[second], (list, tuple)) and after[: len(before)] == before:
                return after, _unweighted(record[second]) | set(range(len(before)))
            return before + after, set(range(len(before)))
    wanted = " and ".join(columns) if columns else _FORMS
    raise InputError(f"it has {', '.join(map(str, record)) or 'nothing'}, not {wanted}: name two columns")


def _messages(value: Any, role: str = "") -> list[dict[str, str]]:
    """Return chat messages; a text is one message of `role`."""
    if role and not isinstance(value, (list, tuple)):
        return [{"role": role, "content": _text(value)}]
    if not isinstance(value, (list, tuple)):
        raise InputError(f"messages is {type(value).__name__}: give a list of role and content")
    found = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(f"a message is {str(message)[:60]!r}: give a role and a content")
        if message.get("tool_calls"):
            raise InputError("a message calls tools, which is not supported: leave such samples out")
        found.append({"role": message["role"], "content": _text(message["content"])})
    return found


def _text(content: Any) -> str:
    """Return a message's text, which may come in parts."""
    if content is None or isinstance(content, str):
        check_text(content or "")
        return content or ""
    if isinstance(content, Sequence) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return _text("".join(part["text"] for part in content))
    raise InputError(f"a content is {type(content).__name__}, not text")


def _unweighted(messages: Sequence[dict[str, Any]]) -> set[int]:
    return {i for i, message in enumerate(messages) if message.get("weight") == 0}
