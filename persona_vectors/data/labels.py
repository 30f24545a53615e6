"""Labels of samples: the truth value that a column of a dataset holds."""

from typing import Any

from persona_vectors.data.errors import InputError

_WORDS = {"true": True, "1": True, "positive": True, "false": False, "0": False, "negative": False, "": None}


def read_label(record: Any, column: str, where: str) -> bool | None:
    """Return a record's truth value; None where it has none. Raises InputError, with `where`, for another value."""
    value = record.get(column) if isinstance(record, dict) else None
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    if value is None:
        return None
    if isinstance(value, (list, dict, str)) or value not in (0, 1):
        ways = "true or false, 1 or 0, positive or negative, or null for no label"
        raise InputError(f"{where}: {column} is {str(value)[:60]!r}: give {ways}")
    return bool(value)
