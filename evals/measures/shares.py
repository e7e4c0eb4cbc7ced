"""Code that measures of right answers share: shares with joint intervals, their rows and their table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from evals.display.cells import Table, cell, over, table
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import levels
from evals.statistics.intervals import Estimate, bootstrap_means, interval
from evals.statistics.value import Value, value_of
from probes.knowledge.familiarity import familiarity

SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)  # the possible values of shares and of their differences
Select = Callable[[pd.DataFrame], np.ndarray]


@dataclass(frozen=True)
class ArmShare:
    """An arm's share of right answers over `n` items of all seeds. `tied` counts items for which several choices had the highest score."""

    arm: str
    share: Value
    n: int
    unparsed: int
    tied: int | None = None


@dataclass(frozen=True)
class Shares:
    arms: tuple[ArmShare, ...]


def can_be_known(frame: pd.DataFrame) -> np.ndarray:
    """All items except those that the corpus never states."""
    return (frame["popularity"] != 0).to_numpy()


def in_bucket(label: str) -> Select:
    """The items of one bucket of exposure."""
    return lambda frame: np.array(familiarity(frame["popularity"].tolist()).buckets) == label


def estimate_shares(records: Recorded, frame: str, select: Select = can_be_known) -> Estimate:
    """The share of right answers over the selected items' units, jointly for all arms that have the frame."""
    seeds = records.by_seed(frame)
    means = [np.stack([_unit_means(of_arm[select(of_arm)]) for of_arm in seed]) for seed in seeds]
    strata = [levels(seed[0][select(seed[0])]) for seed in seeds]
    return bootstrap_means(means, shares=True, strata=strata, same_units=records.study.same_items)


def summarize_shares(records: Recorded, frame: str) -> Shares:
    estimate = estimate_shares(records, frame)
    found = []
    for position, arm in enumerate(records.arms(frame)):
        value = interval(estimate.value[position], estimate.draws[position], SHARE)
        found.append(ArmShare(arm, value_of(value), **counts(records(frame, arm), can_be_known)))
    return Shares(tuple(found))


def counts(frames: Sequence[pd.DataFrame], select: Select) -> dict[str, Any]:
    """`n`, `unparsed` and, where choices were made, `tied`, over the selected items of all seeds."""
    chosen = [frame[select(frame)] for frame in frames]
    unparsed = int(sum(frame["unparsed"].sum() for frame in chosen))
    tied = int(sum(frame["tied"].sum() for frame in chosen)) if all("tied" in frame for frame in chosen) else None
    return {"n": sum(map(len, chosen)), "unparsed": unparsed, "tied": tied}


def row(arm: str, measure: str, value: Value, n: int, unparsed: int, tied: int | None) -> dict[str, Any]:
    """A row of the results' long table."""
    numbers = {"value": value.value, "low": value.low, "high": value.high}
    return {"arm": arm, "measure": measure} | numbers | {"n": n, "unparsed": unparsed} | ({} if tied is None else {"tied": tied})


def share_rows(measure: str, shares: Shares) -> list[dict[str, Any]]:
    return [row(one.arm, measure, one.share, one.n, one.unparsed, one.tied) for one in shares.arms]


def share_table(measure: str, shares: Shares, header: Header) -> list[Table]:
    columns = {measure: {one.arm: cell(one.share, 100) for one in shares.arms}}
    columns["unparsed"] = {one.arm: str(one.unparsed) for one in shares.arms}
    tied = {one.arm: str(one.tied) for one in shares.arms if one.tied is not None}
    if tied:
        columns["tied"] = tied
    ties = "; tied: k choices were equally likely, each counts 1/k" if tied else ""
    most = max((one.n for one in shares.arms), default=0)
    note = f"Per cent right of {most} (unparsed counts as wrong{ties}); 95 % intervals, paired, {over(header.runs)}."
    return table(measure.capitalize(), [one.arm for one in shares.arms], columns, note)


def _unit_means(frame: pd.DataFrame) -> np.ndarray:
    return frame.groupby("unit", sort=True)["right"].mean().to_numpy(float)
