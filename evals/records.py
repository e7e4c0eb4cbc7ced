"""Records: the frames that readings give, each for one arm in one run, with their provenance.

A record is one Parquet file. Its name is the record's key, a hash of everything that decides its content (`running.jobs.keys_of`). It is written
atomically: it is complete or absent. It contains a digest of all its bytes, so that a damaged file is not taken for a record.
"""

import hashlib
import io
import json
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from proxytune.errors import UserError
from proxytune.files import check_writable

PROVENANCE = b"proxytune"
DIGEST = b"proxytune.sha256"  # of the whole file as it is with the blank in the digest's place
BLANK = b"_" * 64
logger = logging.getLogger("proxytune")


@dataclass(frozen=True)
class Record:
    """One frame of one arm in one run (a seed, in a world if the study has worlds, and the number of the tuning). `protocol` is a hash of how the arm
    was asked."""

    arm: str
    frame: str
    world: str | None
    seed: int
    protocol: str
    items: pd.DataFrame
    tuning: int = 0


def write_record(folder: Path, key: str, items: pd.DataFrame, provenance: dict[str, Any]) -> None:
    """Writes a frame and its provenance. Raises `UserError` if the folder cannot be written, or if a link is in the file's place."""
    table = pa.Table.from_pandas(items, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), PROVENANCE: json.dumps(provenance, sort_keys=True).encode()})
    written, mark = io.BytesIO(), secrets.token_hex(32).encode()  # a mark that no item's text can contain
    with pq.ParquetWriter(written, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({DIGEST: mark})
    record = written.getvalue()
    digest = _digest(_filled(record, mark, BLANK))
    target = _path(folder, key)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    for path in (target, partial):
        check_writable(path, "out")
    try:
        partial.write_bytes(_filled(record, mark, digest))
        partial.replace(target)
    except OSError as error:
        raise UserError(f"out: the record '{target}' cannot be written ({error}); free some space or choose another folder") from error
    finally:
        partial.unlink(missing_ok=True)


def read_record(folder: Path, key: str) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """The record's frame and provenance; None if there is no such record, or if it is damaged (it is then made again)."""
    record = _whole(folder, key)
    if record is None:
        return None
    table = pq.read_table(io.BytesIO(record))
    return table.to_pandas(), json.loads(table.schema.metadata[PROVENANCE])


def has_record(folder: Path, key: str) -> bool:
    """Whether there is an undamaged record with this key."""
    return _whole(folder, key) is not None


def _whole(folder: Path, key: str) -> bytes | None:
    """The bytes of an undamaged record; None if there is none, with a warning if it is damaged."""
    path = _path(folder, key)
    try:
        record = path.read_bytes()
        digest = pq.read_metadata(io.BytesIO(record)).metadata[DIGEST]
        if len(digest) == len(BLANK) and _digest(_filled(record, digest, BLANK)) == digest:
            return record
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        pass
    logger.warning("the record '%s' is damaged; it is made again", path)
    return None


def _digest(record: bytes) -> bytes:
    return hashlib.sha256(record).hexdigest().encode()


def _filled(record: bytes, old: bytes, new: bytes) -> bytes:
    """The record with the digest at its place replaced."""
    return record.replace(old, new, 1)


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.parquet"
