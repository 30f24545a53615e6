"""A JSONL file of keyed entries, appended as they come: what a killed run has done stays done."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from persona_vectors.data.checks import check_settings


class Ledger:
    """Entries by key, in memory and in a file; a later entry of a key adds to the earlier one.

    Give `path=None` to keep them in memory alone. With `settings` the file's first line holds them, and a file that
    was made with others is refused. A line that a killed run left cut is passed over.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.found: dict[str, dict[str, Any]] = {}
        lines = self.path.read_bytes().split(b"\n") if self.path and self.path.is_file() else [b""]
        for entry in filter(None, map(_parse, lines)):
            if "key" in entry:
                self.found.setdefault(entry["key"], {}).update(entry)
            if "settings" in entry:
                check_settings(str(path), entry["settings"], settings or {})
        if lines[-1]:
            self._write("\n")  # after a cut line
        elif settings is not None and lines == [b""]:
            self._write(json.dumps({"settings": settings}) + "\n")

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Add entries, each with its "key", in one write."""
        entries = list(entries)
        self._write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
        for entry in entries:
            self.found.setdefault(entry["key"], {}).update(entry)

    def _write(self, text: str) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return entry if isinstance(entry, dict) else None
