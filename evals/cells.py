"""What tables are made of: a value with its interval as text, and a table with its title and its note."""

from typing import Any, NamedTuple

import pandas as pd


class Table(NamedTuple):
    title: str
    frame: pd.DataFrame
    note: str


def cell(row: Any, scale: int | float = 1, digits: int = 1) -> str:
    """`value [low, high]` of a row or None, scaled: its `note` instead where it has one, no interval where it has none, n/a without a value."""
    if row is None or (row.get("value") is None and not isinstance(row.get("note"), str)):
        return "n/a"
    if isinstance(row.get("note"), str):
        return str(row["note"])
    value, low, high = (None if row[name] is None else f"{row[name] * scale:.{digits}f}" for name in ("value", "low", "high"))
    return str(value) if low is None else f"{value} [{low}, {high}]"


def over(results: dict[str, Any]) -> str:
    """What the intervals of a study are over."""
    seeds = len(results["seeds"])
    return (
        "over units of one seed: of this model and this run"
        if seeds == 1
        else f"t over the means of {seeds} seeds, or over units within them where that is wider"
    )
