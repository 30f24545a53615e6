"""Checks that every file of ours needs: the same settings as before, and a fault named by its field."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from persona_vectors.data.errors import InputError


def check_settings(path: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError, naming the first difference, where a file was made with other settings than those wanted."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise InputError(
                f"{path} was made with {name}={found.get(name)!r}, not {value!r}: "
                "give the same settings, or another file"
            )


def first_fault(error: ValidationError) -> str:
    """Return pydantic's first complaint in a line: the field, and what is wrong with it."""
    first = error.errors()[0]
    return f"field {'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


def check_text(text: str) -> None:
    """Raise InputError for text with half a surrogate pair, which JSON can hold and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"character {error.start} of a text is half a surrogate pair, no character: mend it") from None
