"""Every arm's answer to every item, in one file, and answers of several arms to the same items, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from evals.display.cells import Table
from evals.records import Record
from proxytune.errors import UserError
from proxytune.files import check_readable, check_writable

FILE = "items.parquet"
TOKENS = "tokens"  # the reading that explains answers
ADDED: dict[str, Any] = {"tuning": 0, "popularity": float("nan"), "tokens": ""}  # columns that files of older versions lack
NEEDED = {"reading": str, "world": str, "seed": int, "arm": str, "question": str, "answer": str, "text": str, "right": float, "unparsed": bool}
STATES = ("right", "wrong", "unparsed")
RUN = ["world", "seed", "tuning"]


def all_items(records: Sequence[Record]) -> pd.DataFrame:
    """One row per answer: reading, world, seed, tuning, arm, unit, question, answer, popularity (in a world: the fact's exposure; NaN if it is not
    known), text, right (a share: 1/k in a tie of k), unparsed, tied, and tokens (what each member gave every token, as JSON; empty for most)."""
    columns = ["reading", "world", "seed", "tuning", "arm", "unit", "question", "answer", "popularity", "text", "right", "unparsed", "tied", "tokens"]
    explained = {(record.arm, record.world, record.seed, record.tuning): record.items for record in records if record.frame == TOKENS}
    frames = [
        record.items.assign(
            reading=record.frame,
            world=record.world or "",
            seed=record.seed,
            tuning=record.tuning,
            arm=record.arm,
            popularity=record.items.get("popularity", float("nan")),
            tied=record.items.get("tied", False),
            tokens=_tokens(record, explained.get((record.arm, record.world, record.seed, record.tuning))),
        )
        for record in records
        if "text" in record.items
    ]
    if not frames:
        return pd.DataFrame()
    return pd.concat(frames, ignore_index=True)[columns].astype({"popularity": float, "right": float, "tied": bool})


def _tokens(record: Record, explained: pd.DataFrame | None) -> list[str]:
    """Of each item of the task, its answer's tokens; those of other readings are not explained."""
    if explained is None or record.frame != "task":
        return [""] * len(record.items)
    known = dict(zip(explained["number"], explained["tokens"], strict=True))
    return [known.get(number, "") for number in range(len(record.items))]


def write_items(records: Sequence[Record], folder: Path) -> Path:
    """Writes all items into one Parquet file, complete or not at all. Raises `UserError` if a link is in its place."""
    partial = folder / f".{FILE}"
    for path in (folder / FILE, partial):
        check_writable(path, "out")
    all_items(records).to_parquet(partial, index=False)
    return partial.replace(folder / FILE)


def read_items_of(folder: Path) -> pd.DataFrame:
    """The content of the file that `compare` has written. Raises `UserError` if there is none, or if columns are missing or hold other values."""
    check_readable(folder / FILE, "folder")
    try:
        items = pd.read_parquet(folder / FILE)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"folder: '{folder}' holds no {FILE}; give the folder that proxytune compare wrote its results to") from error
    missing = [name for name in NEEDED if name not in items]
    if "measurement" in items and "reading" in missing:
        raise UserError(f"folder: '{folder / FILE}' is of an older version (its column reading was called measurement); run the study again")
    if missing:
        raise UserError(
            f"folder: '{folder / FILE}' lacks the columns {', '.join(missing)}; give the folder that proxytune compare wrote its results to"
        )
    items = items.assign(**{name: value for name, value in ADDED.items() if name not in items})
    kinds = NEEDED | {"tuning": int, "popularity": float, "tokens": str}
    try:
        return items.astype({name: kind for name, kind in kinds.items() if items[name].dtype != kind})
    except (ValueError, TypeError) as error:
        raise UserError(f"folder: '{folder / FILE}' holds other values than proxytune compare writes ({error}); run it again") from error


def numbered(items: pd.DataFrame) -> pd.DataFrame:
    """The items with their `number` in each arm's run. Two items may ask the same of the same unit: their order tells them apart."""
    return items.assign(number=items.groupby(["reading", *RUN, "arm"], sort=False).cumcount())


def side_by_side(items: pd.DataFrame, measure: str | None, where: str, limit: int) -> Table:
    """The items of a reading (None: the first) for which every condition of `where` holds, with the answers of the named arms (of all arms if none is
    named), and with the items' popularity (in a world: exposure) if it is known.

    A condition is an arm and right, wrong (ties are wrong) or unparsed: `full right, proxy@1 wrong`. Raises `UserError` for a reading, an
    arm or a state that is none.
    """
    readings = list(items["reading"].unique())
    measure = readings[0] if measure is None else measure
    if measure not in readings:
        raise UserError(f"--measure: there is none called '{measure}'; there are {', '.join(readings)}")
    chosen = items[items["reading"] == measure]
    run = [name for name in RUN if name == "seed" or chosen[name].nunique() > 1]
    chosen = numbered(chosen)
    arms = list(chosen["arm"].unique())
    conditions = [_condition(part, arms) for part in where.split(",") if part.strip()]
    index = [*run, "number", "question", "answer"]
    wide = {name: chosen.pivot(index=index, columns="arm", values=name) for name in ("text", "right", "unparsed")}
    kept = pd.Series(True, index=wide["text"].index)
    for arm, state in conditions:
        right, unparsed = wide["right"][arm] == 1, wide["unparsed"][arm].astype(bool)
        kept &= right if state == "right" else unparsed if state == "unparsed" else ~right
    shown = list(dict.fromkeys(arm for arm, _ in conditions)) or arms
    marks = wide["right"][kept].map(lambda right: "✓ " if right == 1 else "✗ ")
    found = marks[shown].astype(str) + wide["text"].loc[kept, shown].astype(str)
    frame = found.reset_index().join(chosen.groupby([*run, "number"])["popularity"].first(), on=[*run, "number"])
    known = ["popularity"] if frame["popularity"].notna().any() else []
    frame["popularity"] = frame["popularity"].map("{:.12g}".format)
    frame = frame[[*run, "question", "answer", *known, *shown]].astype(str)
    note = f"{len(frame)} of {len(kept)} items{f', the first {limit} shown' if len(frame) > limit else ''}; ✓ right, ✗ wrong."
    return Table(f"{measure}: {where or 'all'}", frame.head(limit), note)


def _condition(text: str, arms: Sequence[str]) -> tuple[str, str]:
    arm, _, state = text.strip().rpartition(" ")
    if state not in STATES:
        raise UserError(f"--where: {text.strip()!r} does not end in {', '.join(STATES)}; write 'full right, proxy@1 wrong'")
    if arm.strip() not in arms:
        raise UserError(f"--where: there is no arm {arm.strip()!r}; there are {', '.join(arms)}")
    return arm.strip(), state
