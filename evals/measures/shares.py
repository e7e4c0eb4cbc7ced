"""What measures of right answers have in common: shares with joint intervals, and `ShareMeasure`, which is just such a share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from evals.display.cells import Table, cell, over, table
from evals.measures.measure import Measure, Settings, Share
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


def estimate_shares(records: Recorded, frame: str, select: Select = can_be_known, *, same_items: bool | None = None) -> Estimate:
    """The share of right answers over the selected items' units, jointly for all arms that have the frame. `same_items`: every seed has the
    same items (None: as the study says)."""
    seeds = records.by_seed(frame)
    arms, places = records.distinct(frame)
    chosen = [records.arms(frame).index(arm) for arm in arms]
    means = [np.stack([_unit_means(seed[place][select(seed[place])]) for place in chosen]) for seed in seeds]
    strata = [levels(seed[0][select(seed[0])]) for seed in seeds]
    value, draws = bootstrap_means(means, shares=True, strata=strata, same_units=records.study.same_items if same_items is None else same_items)
    return Estimate(value[places], draws[places])


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


def share_table(title: str, column: str, arms: Sequence[ArmShare], header: Header) -> list[Table]:
    """The table of the arms' shares, with what was unparsed and, where choices were made, tied."""
    columns = {column: {one.arm: cell(one.share, 100) for one in arms}}
    columns["unparsed"] = {one.arm: str(one.unparsed) for one in arms}
    tied = {one.arm: str(one.tied) for one in arms if one.tied is not None}
    if tied:
        columns["tied"] = tied
    ties = "; tied: k choices were equally likely, each counts 1/k" if tied else ""
    most = max((one.n for one in arms), default=0)
    note = f"Per cent right of {most} (unparsed counts as wrong{ties}); 95 % intervals, paired, {over(header.runs)}."
    return table(title, [one.arm for one in arms], columns, note)


class ShareMeasure(Measure[Shares]):
    """A measure that is the arms' share of right answers in one reading, which has the measure's name."""

    summary = Shares
    of_answers = True

    def summarize(self, records: Recorded, settings: Settings) -> Shares:
        estimate = estimate_shares(records, self.name)
        found = []
        for position, arm in enumerate(records.arms(self.name)):
            value = interval(estimate.value[position], estimate.draws[position], SHARE)
            found.append(ArmShare(arm, value_of(value), **counts(records(self.name, arm), can_be_known)))
        return Shares(tuple(found))

    def tables(self, summary: Shares, header: Header) -> list[Table]:
        return share_table(self.name.capitalize(), self.name, summary.arms, header)

    def rows(self, summary: Shares) -> list[dict[str, Any]]:
        return [row(one.arm, self.name, one.share, one.n, one.unparsed, one.tied) for one in summary.arms]

    def shares(self, records: Recorded) -> Mapping[str, Share]:
        return {self.name: Share(estimate_shares(records, self.name), records.by_seed(self.name))}


def _unit_means(frame: pd.DataFrame) -> np.ndarray:
    return frame.groupby("unit", sort=True)["right"].mean().to_numpy(float)
