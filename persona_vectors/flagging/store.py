"""Base answers and their projections, kept by prompt."""

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from persona_vectors.data.errors import InputError


class Baselines:
    """Base answers and their projections, in an SQLite file, by prompt: what was made once is not made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.database = sqlite3.connect(path, timeout=60)
            self.database.execute(
                "CREATE TABLE IF NOT EXISTS baselines (key TEXT, reading TEXT, ids BLOB, readings BLOB,"
                " PRIMARY KEY (key, reading)) WITHOUT ROWID"
            )
            self.database.execute("CREATE TABLE IF NOT EXISTS seen (key TEXT PRIMARY KEY) WITHOUT ROWID")
        except sqlite3.Error as error:
            raise InputError(f"cannot use the baseline cache {path} ({error}): remove it, or give another") from None

    def is_new(self, key: str) -> bool:
        """Say whether a key is asked about for the first time."""
        return self.database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1

    def answer(self, key: str) -> list[int] | None:
        """Return the tokens of the answer to a prompt, whatever was read in it."""
        row = self.database.execute("SELECT ids FROM baselines WHERE key = ? LIMIT 1", (key,)).fetchone()
        return None if row is None else np.frombuffer(row[0], np.int32).tolist()

    def find(self, key: str, reading: str) -> tuple[list[int], np.ndarray] | None:
        """Return an answer's tokens and its projections [key]."""
        query = "SELECT ids, readings FROM baselines WHERE key = ? AND reading = ?"
        row = self.database.execute(query, (key, reading)).fetchone()
        return None if row is None else (np.frombuffer(row[0], np.int32).tolist(), np.frombuffer(row[1], np.float32))

    def add(self, reading: str, keys: Iterable[str], ids: Iterable[Sequence[int]], values: Iterable[Any]) -> None:
        """Keep answers and their projections, all of them or none."""
        rows = [
            (key, reading, np.array(tokens, np.int32).tobytes(), np.array(value, np.float32).tobytes())
            for key, tokens, value in zip(keys, ids, values)
        ]
        try:
            with self.database:
                self.database.executemany("INSERT OR REPLACE INTO baselines VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise InputError(f"cannot write the baseline cache {self.path} ({error}): make room for it") from None

    def close(self) -> None:
        self.database.close()
