"""Parts of tables: a value with its interval as text, and a table with its title and its note."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pandas as pd

from evals.statistics.value import Value

Columns = dict[str, dict[str, str]]
FEW_COLUMNS = 7  # so many fit on a page


class Table(NamedTuple):
    """`frame` holds text only; its first column names the rows."""

    title: str
    frame: pd.DataFrame
    note: str


def cell(value: Value | None, scale: int | float = 1, digits: int = 1) -> str:
    """`value [low, high]`, scaled. The value's note instead, if it has one; only the value, if it has no interval; n/a without a value."""
    if value is not None and value.note:
        return value.note
    if value is None or value.value is None:
        return "n/a"
    shown, low, high = (None if number is None else f"{number * scale:.{digits}f}" for number in (value.value, value.low, value.high))
    return str(shown) if low is None else f"{shown} [{low}, {high}]"


def table(title: str, rows: Iterable[str], columns: Mapping[str, Mapping[str, str]], note: str, first: str = "arm") -> list[Table]:
    """A list with one table, built from columns of cells by row. Rows without any cell are left out; without rows the list is empty."""
    shown = [row for row in dict.fromkeys(rows) if any(row in cells for cells in columns.values())]
    frame = pd.DataFrame({first: shown} | {name: [cells.get(row, "") for row in shown] for name, cells in columns.items()}, dtype=str)
    return [Table(title, frame, note)] if shown else []


def over(runs: int) -> str:
    """What the intervals of a study with this many runs (a run is a seed in a world) are over, in words."""
    return (
        "over units of one seed: of this model and this run"
        if runs == 1
        else f"t over the means of {runs} seeds, or over units within them where that is wider"
    )
