"""Answers that a model has given, kept on disk: keyed by the model itself and the request, never by the request alone."""

import hashlib
import json
import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxytune.errors import UserError

ERRORS = (sqlite3.Error, UnicodeDecodeError)  # the second where sqlite3 would quote a damaged name
logger = logging.getLogger("proxytune")


class Responses:
    """One SQLite file of JSON values. An empty text, 0 and minus infinity are answers like any other; None is none.

    Each value stands with the digest of its key and itself. A value that is damaged is none; a file that is damaged is set aside,
    which a warning says, and a new one begun.
    """

    def __init__(self, path: Path):
        """Raises `UserError` where the file cannot be opened or is something else."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except (OSError, *ERRORS) as error:
            if not _is_damage(error):
                raise UserError(f"cache: '{path}' cannot be opened as a file of answers ({error}); choose another") from error
            self._begin_anew(error)

    def get(self, key: str) -> Any | None:
        """Raises `UserError` where the file cannot be read, as while another process writes for more than a minute."""
        try:
            row = self._file.execute("SELECT value FROM responses WHERE key = ?", (key,)).fetchone()
        except ERRORS as error:
            self._begin_anew(error)
            row = None
        digest, _, value = row[0].partition(b" ") if row is not None and isinstance(row[0], bytes) else (b"", b"", b"")
        return json.loads(value) if digest == _digest(key, value) else None

    def put(self, values: Mapping[str, Any]) -> None:
        """All of them or, if it is interrupted, none. Raises `UserError` where the file cannot be written."""
        texts = {key: json.dumps(value).encode() for key, value in values.items()}
        rows = [(key, (_digest(key, text) + b" " + text).decode()) for key, text in texts.items()]
        try:
            self._write(rows)
        except ERRORS as error:
            self._begin_anew(error)
            self._write(rows)

    def _open(self) -> None:
        self._file = sqlite3.connect(self._path, timeout=60)
        self._file.text_factory = bytes  # a damaged text need not be one
        with self._file:
            self._file.execute("CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
            self._file.execute("SELECT key, value FROM responses LIMIT 0")  # a table of that name may be something else

    def _write(self, rows: list[tuple[str, str]]) -> None:
        with self._file:
            self._file.executemany("INSERT OR REPLACE INTO responses VALUES (?, ?)", rows)

    def _begin_anew(self, error: Exception) -> None:
        """Sets a damaged file aside; for any other error, of the disk or of a file in use, raises `UserError`."""
        if not _is_damage(error):
            raise UserError(f"cache: '{self._path}' cannot be used ({error}); free some space or choose another") from error
        aside = self._path.with_name(f"{self._path.name}.damaged")
        logger.warning("the answers in '%s' are damaged (%s); they are asked again, and the file is now '%s'", self._path, error, aside)
        self._file.close()
        self._path.replace(aside)
        self._path.with_name(f"{self._path.name}-journal").unlink(missing_ok=True)  # it would be played back into the new file
        self._open()


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
    return isinstance(error, UnicodeDecodeError) or code & 0xFF == sqlite3.SQLITE_CORRUPT


def _digest(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b" " + value).hexdigest().encode()
