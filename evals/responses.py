"""Answers that a model has given, kept on disk: keyed by the model itself and the request, never by the request alone."""

import json
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxytune.errors import UserError


class Responses:
    """One SQLite file of JSON values. An empty text, 0 and minus infinity are answers like any other; None is none."""

    def __init__(self, path: Path):
        """Raises `UserError` where the file cannot be opened or is something else."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=60)
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"cache: '{path}' cannot be opened as a file of answers ({error}); choose another") from error

    def get(self, key: str) -> Any | None:
        row = self._file.execute("SELECT value FROM responses WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, values: Mapping[str, Any]) -> None:
        """All of them or, if it is interrupted, none."""
        with self._file:
            self._file.executemany("INSERT OR REPLACE INTO responses VALUES (?, ?)", [(key, json.dumps(value)) for key, value in values.items()])
