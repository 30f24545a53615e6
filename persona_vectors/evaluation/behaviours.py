"""Questions about a behaviour, as Anthropic's evals and CAA publish them, made into counterbalanced statements."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from persona_vectors.data.errors import InputError
from persona_vectors.data.samples import read_records

FIELDS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
_CHOICES = re.compile(
    r"(?P<ask>.*^[ \t]*\(A\)[ \t]*)(?P<a>.+?)(?P<then>\s*^[ \t]*\(B\)[ \t]*)(?P<b>.+?)(?P<end>\s*(Answer:)?\s*)",
    re.DOTALL | re.MULTILINE,
)


class _Row(NamedTuple):
    question: str
    pos: str
    """The answer that shows the behaviour."""
    neg: str
    confidence: float
    where: str


def read_behaviour(path: str | Path) -> dict[str, Any]:
    """Return the fields of `Statements` that a file of rows makes: JSONL or a JSON list, of `FIELDS`.

    No answer is always the one that shows the behaviour, so that a model that likes to say it shows nothing. A question
    with choices (A) and (B) is asked in both orders. Of questions that are answered Yes or No, one whose Yes shows the
    behaviour and one whose No does are an item together; those with the highest `label_confidence` come first, and what
    one side has more of is left out.

    Raises InputError, with the place, for other rows, and where Yes, or No, is the answer that shows it throughout.
    """
    rows = [_row(record, where) for where, record in read_records(path)]
    rows.sort(key=lambda row: -row.confidence)
    kinds = {frozenset((row.pos, row.neg)) for row in rows}
    if kinds == {frozenset(("Yes", "No"))}:
        sides = [[row for row in rows if row.pos == answer] for answer in ("Yes", "No")]
        if not all(sides):
            raise InputError(
                f"{path}: {'No' if sides[1] else 'Yes'} always shows the behaviour: give rows of both kinds"
            )
        return _statements([row for both in zip(*sides) for row in both])
    if kinds == {frozenset(("(A)", "(B)"))}:
        return _statements([order for row in rows for order in (row, _swapped(row))])
    strange = [row for row in rows if {row.pos, row.neg} not in ({"Yes", "No"}, {"(A)", "(B)"})]
    if not strange:
        raise InputError(f"{path} holds {'rows of both kinds' if rows else 'no rows'}: give Yes and No, or (A) and (B)")
    raise InputError(f"{strange[0].where}: the answers are {strange[0][1:3]}: give Yes and No, or (A) and (B)")


def _row(record: Any, where: str) -> _Row:
    if isinstance(record, InputError):
        raise InputError(f"{where}: {record}")
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in FIELDS):
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{where}: it has {found}, not {', '.join(FIELDS)}, as texts")
    question, pos, neg = (record[name].strip() for name in FIELDS)
    return _Row(question, pos, neg, float(record.get("label_confidence") or 0), where)


def _swapped(row: _Row) -> _Row:
    """Return a question with its two choices changed over, and the answers too."""
    found = _CHOICES.fullmatch(row.question)
    if found is None or re.search(r"^[ \t]*\(C\)", row.question, re.MULTILINE):
        raise InputError(f"{row.where}: the question has no two choices (A) and (B) on lines of their own")
    question = "".join(found[name] for name in ("ask", "b", "then", "a", "end"))
    return row._replace(question=question, pos=row.neg, neg=row.pos)


def _statements(rows: Sequence[_Row]) -> dict[str, Any]:
    pairs = [{"pos": row.pos, "neg": row.neg} for row in rows]
    return {"question": [row.question for row in rows], "pairs": pairs, "orders": 2}
