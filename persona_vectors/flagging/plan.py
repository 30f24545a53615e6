"""The first step of a flagging run: every sample is read, templated and tokenised once, into numbered parts."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import bar
from persona_vectors.data.samples import Sample, Source
from persona_vectors.evaluation.judges import SentimentJudge
from persona_vectors.flagging.parts import part, read_json, write_json, write_table
from persona_vectors.flagging.store import Baselines
from persona_vectors.model.prompts import encode_answer, finished_turn, fit

SENTIMENT_OF = 1000
"""How many characters of an answer VADER reads: its time grows with their square."""


def source_name(source: Source) -> str:
    """Return how a source is named in a file: a Hub id, or a file's name without its folder."""
    if not isinstance(source, (str, Path)):
        return f"a {type(source).__name__}"
    return Path(source).name if Path(source).exists() else str(source)


def make_plan(
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[Sample | InputError],
    folder: Path,
    *,
    stop: bool,
    limit: int | None,
    new_tokens: int,
    answers: Iterable[Sample | InputError] | None,
    cache: Path,
    namespace: str,
    reading: str,
    chunk: int,
    labels: str | None,
) -> dict[str, Any]:
    """Write `folder`'s parts, "rows" and the "prompts" that lack a base answer; returns how many, counts and a digest.

    Which prompts are generated together is fixed here, so that a run that was killed, or that has several workers,
    ends with the same numbers. A plan that is there is only checked against the samples.
    """
    known = folder / "plan.json"
    if known.exists():
        plan = read_json(known)
        check_digest(samples, plan["digest"], folder)
        return plan
    seen = hashlib.sha256()
    rows, prompts = _Parts(folder, "rows", chunk), _Parts(folder, "prompts", chunk)
    (folder / "baselines.sqlite").unlink(missing_ok=True)
    given = None if answers is None else _Given(folder / "given.sqlite", answers)
    reader = _Reader(tokenizer, limit, new_tokens, given, namespace, stop, labels)
    with closing(Baselines(folder / "baselines.sqlite")) as here, closing(Baselines(cache)) as kept:
        for sample in bar(samples, desc="reading samples", unit="sample"):
            seen.update(repr(sample).encode())
            row = reader.read(sample)
            if row is None:
                continue
            base = row.pop("base")
            rows.add(**row)
            if (new_tokens or given is not None) and here.is_new(row["key"]):
                found = kept.find(row["key"], reading) if given is None else None
                if found is not None:
                    here.add(reading, [row["key"]], [found[0]], [found[1]])
                else:
                    base = kept.answer(row["key"]) if given is None else base
                    prompts.add(key=row["key"], prompt_ids=row["prompt_ids"], answer_ids=base)
        rows.write()
        prompts.write()
        here.database.commit()
    reader.check_labels()
    plan = {"chunks": rows.number, "groups": prompts.number, "counts": reader.counts, "digest": seen.hexdigest()}
    write_json(known, plan)
    return plan


@dataclass
class _Reader:
    """Templates and tokenises samples, and counts what it saw."""

    tokenizer: PreTrainedTokenizerBase
    limit: int | None
    new_tokens: int
    given: "_Given | None"
    namespace: str
    stop: bool
    labels: str | None

    def __post_init__(self) -> None:
        self.counts = {"samples": 0, "truncated": 0, "empty": 0, "skipped": 0}
        if self.labels:
            self.counts |= {"labelled": 0, "labelled_true": 0}
            self.sentiment = SentimentJudge()

    def read(self, sample: Sample | InputError) -> dict[str, Any] | None:
        """Return a sample's row, with its given base answer as `base`; None for what is no sample and is left out."""
        try:
            if isinstance(sample, InputError):
                raise sample
            talk = sample.talk
            whole = encode_answer(self.tokenizer, *finished_turn(self.tokenizer, talk, len(sample.prompt)))
            prompt, answer = fit(whole, self.limit, self.new_tokens)
            base = None
            if self.given is not None:
                talk[-1] = {"role": "assistant", "content": self.given.find(sample)}
                base = encode_answer(self.tokenizer, *finished_turn(self.tokenizer, talk, len(sample.prompt)))[1]
                base = base if self.limit is None else base[: self.limit - len(prompt)]
        except InputError as error:
            if self.stop:
                raise InputError(f"{error} (on_error='skip' leaves such records out, and counts them)") from None
            self.counts["skipped"] += 1
            return None
        cut = (len(prompt), len(answer)) != (len(whole[0]), len(whole[1]))
        for name, seen in (("samples", True), ("truncated", cut), ("empty", not answer)):
            self.counts[name] += seen
        told = {}
        if self.labels:
            self.counts["labelled"] += sample.label is not None
            self.counts["labelled_true"] += sample.label is True
            told = {"label": sample.label, "sentiment": self.sentiment.compound(sample.answer[:SENTIMENT_OF])}
        name = hashlib.sha256(np.array(prompt, np.int32).tobytes()).hexdigest()
        own = base is not None and hashlib.sha256(repr(base).encode()).hexdigest()
        return {
            "row": sample.row,
            "turn": sample.turn,
            "id": sample.id,
            "key": f"{name} {own}" if own else f"{self.namespace} {name}",
            "prompt_hash": name[:16],
            "prompt_ids": prompt,
            "answer_ids": answer,
            "truncated": cut,
            "base": base,
            **told,
        }

    def check_labels(self) -> None:
        """Raise InputError where the labels are all alike, or there are none."""
        if self.labels and not 0 < self.counts["labelled_true"] < self.counts["labelled"]:
            true = self.counts["labelled_true"]
            raise InputError(
                f"labels={self.labels!r} says true of {true} samples and false of {self.counts['labelled'] - true}: "
                "name a column that says both"
            )


def check_digest(samples: Iterable[Sample | InputError], wanted: str, where: Path) -> None:
    """Raise InputError where the samples are not those that a file was made from."""
    seen = hashlib.sha256()
    for sample in bar(samples, desc="checking samples", unit="sample"):
        seen.update(repr(sample).encode())
    if seen.hexdigest() != wanted:
        raise InputError(f"{where} was made from other samples than these: give the same data, or another file")


class _Parts:
    """Rows that become one file after another, `size` rows each."""

    def __init__(self, folder: Path, kind: str, size: int) -> None:
        self.folder, self.kind, self.size, self.number = folder, kind, size, 0
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        if len(self.rows) == self.size:
            self.write()

    def write(self) -> None:
        if self.rows:
            columns = {name: [row[name] for row in self.rows] for name in self.rows[0]}
            write_table(part(self.folder, self.kind, self.number), columns)
            self.number, self.rows = self.number + 1, []


class _Given:
    """Answers that the user supplies, by prompt, in a file, so that they take no memory."""

    def __init__(self, path: Path, answers: Iterable[Sample | InputError]) -> None:
        path.unlink(missing_ok=True)
        self.database = sqlite3.connect(path)
        self.database.execute("CREATE TABLE answers (prompt TEXT PRIMARY KEY, answer TEXT)")
        for sample in bar(answers, desc="reading answers", unit="answer"):
            if isinstance(sample, InputError):
                raise sample
            row = json.dumps(sample.prompt), sample.answer
            self.database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", row)

    def find(self, sample: Sample) -> str:
        query = "SELECT answer FROM answers WHERE prompt = ?"
        row = self.database.execute(query, (json.dumps(sample.prompt),)).fetchone()
        if row is None:
            asked = sample.prompt[-1]["content"][:60]
            raise InputError(f"sample {sample.id}: the given answers have none to the prompt {asked!r}: add it")
        return row[0]
