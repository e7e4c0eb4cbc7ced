"""Records: what measuring one arm with one measure and one seed gave, item by item, with its provenance.

A record is one Parquet file named by a hash of its content's causes, written atomically: it is there whole or not at all.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from proxytune.errors import UserError
from proxytune.files import check_writable

PROVENANCE = b"proxytune"


@dataclass(frozen=True)
class Record:
    """One arm, one measurement, one seed: its items, how they were asked, and what the arm cost (see `costs`)."""

    arm: str
    measurement: str
    seed: int
    protocol: str
    items: pd.DataFrame
    cost: Mapping[str, Any]


def write_record(folder: Path, key: str, items: pd.DataFrame, provenance: dict[str, Any]) -> None:
    """Writes `items` (one row an item) and its provenance. Raises `UserError` where the folder cannot be written or a link is in the way."""
    table = pa.Table.from_pandas(items, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), PROVENANCE: json.dumps(provenance, sort_keys=True).encode()})
    target = _path(folder, key)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    for path in (target, partial):
        check_writable(path, "out")
    try:
        pq.write_table(table, partial, write_page_checksum=True)
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"out: the record '{target}' cannot be written ({error}); free some space or choose another folder") from error


def read_record(folder: Path, key: str) -> tuple[pd.DataFrame, dict[str, Any]] | None:
    """The record's items and provenance; None where there is none or the file is damaged (it is then made again)."""
    try:
        table = pq.read_table(_path(folder, key), page_checksum_verification=True)
        return table.to_pandas(), json.loads(table.schema.metadata[PROVENANCE])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.parquet"
