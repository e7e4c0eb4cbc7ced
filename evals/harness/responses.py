"""A cache of answers on disk, keyed by the model itself and the request, never by the request alone."""

import hashlib
import json
import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxytune.errors import UserError

ERRORS = (sqlite3.Error, UnicodeDecodeError)  # the second is raised when sqlite3 quotes a damaged name
logger = logging.getLogger("proxytune")


class Responses:
    """One SQLite file of JSON values. An empty text, 0 and minus infinity are valid answers; None means that there is no answer.

    Each value is stored with a digest of its key and itself. A damaged value counts as missing. A damaged file is renamed, with a
    warning, and a new one is started.
    """

    def __init__(self, path: Path):
        """Raises `UserError` if the file cannot be opened or is not a file of answers."""
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except (OSError, *ERRORS) as error:
            if not _is_damage(error):
                raise UserError(f"cache: '{path}' cannot be opened as a file of answers ({error}); choose another") from error
            self._begin_anew(error)

    def get(self, key: str) -> Any | None:
        """The answer, or None. Raises `UserError` if the file cannot be read, for example if another process writes for more than a minute."""
        try:
            row = self._file.execute("SELECT value FROM responses WHERE key = ?", (key,)).fetchone()
        except ERRORS as error:
            self._begin_anew(error)
            row = None
        digest, _, value = row[0].partition(b" ") if row is not None and isinstance(row[0], bytes) else (b"", b"", b"")
        return json.loads(value) if digest == _digest(key, value) else None

    def put(self, values: Mapping[str, Any]) -> None:
        """Stores all answers or, if it is interrupted, none. Raises `UserError` if the file cannot be written."""
        texts = {key: json.dumps(value).encode() for key, value in values.items()}
        rows = [(key, (_digest(key, text) + b" " + text).decode()) for key, text in texts.items()]
        try:
            self._write(rows)
        except ERRORS as error:
            self._begin_anew(error)
            self._write(rows)

    def _open(self) -> None:
        self._file = sqlite3.connect(self._path, timeout=60)
        self._file.text_factory = bytes  # damaged text may not be valid UTF-8
        with self._file:
            self._file.execute("CREATE TABLE IF NOT EXISTS responses (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
            self._file.execute("SELECT key, value FROM responses LIMIT 0")  # a table of that name may have other columns

    def _write(self, rows: list[tuple[str, str]]) -> None:
        with self._file:
            self._file.executemany("INSERT OR REPLACE INTO responses VALUES (?, ?)", rows)

    def _begin_anew(self, error: Exception) -> None:
        """Renames a damaged file and starts a new one. Raises `UserError` for any other error, such as a full disk or a file in use."""
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
