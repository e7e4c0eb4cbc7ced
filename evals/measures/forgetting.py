"""Forgetting: what an arm no longer knows of what the base knew, by exposure, with three read-outs (see `probes/knowledge/familiarity.py`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from pydantic import Field

from evals.display.cells import Table, cell, table
from evals.display.chart import Axis, Chart, Panel, Series, all_scaled, exposure_axis
from evals.measures.answers import Chosen, Generated
from evals.measures.inputs import Inputs
from evals.measures.knowledge import STATEMENTS
from evals.measures.measure import Measure, Reading, Settings
from evals.measures.registry import register
from evals.measures.shares import DIFFERENCE, SHARE, counts, estimate_shares, in_bucket, row
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.intervals import interval
from evals.statistics.value import Value, value_of
from probes.knowledge.familiarity import familiarity

QUESTIONS = Generated("forgetting/question", "knowledge", "question")
CHOICES = Chosen("forgetting/choice", "knowledge", "statement")
READOUTS = {
    STATEMENTS.name: ("forgetting", "continuing a statement"),
    QUESTIONS.name: ("forgetting/question", "asked in the tuned format"),
    CHOICES.name: ("forgetting/choice", "choosing among candidates, in any format"),
}
ALIKE = 0.99  # read-outs that agree in so many answers tell the same: the tables show the first


class ForgettingSettings(Settings):
    """Which read-outs are made. Choosing needs one scored text for every candidate; it costs as much as the other two together."""

    choices: bool = Field(default=True, description="also choose among the candidates, where the items have some")


@dataclass(frozen=True)
class Bucket:
    """One arm, read-out and bucket of exposure: the arm's `share` right, and the base's share minus it (`forgotten`; None for the base itself)."""

    readout: str
    bucket: str
    arm: str
    share: Value
    forgotten: Value | None
    n: int
    unparsed: int
    tied: int | None = None


@dataclass(frozen=True)
class Agreement:
    """The share of `n` answers (of all arms, seeds and items) that two read-outs both count as right, or both as wrong."""

    first: str
    second: str
    share: float
    n: int


@dataclass(frozen=True)
class Forgotten:
    buckets: tuple[Bucket, ...]
    agreements: tuple[Agreement, ...] = ()


class Forgetting(Measure[Forgotten]):
    name = "forgetting"
    question = "What does an arm no longer know of what the base knew, by how often pretraining stated it?"
    controls = "Paired over the same items; no fact is in the tuning data; facts that were never stated are the floor."
    needs = frozenset({"knowledge.statement", "knowledge.popularity"})
    settings = ForgettingSettings
    summary = Forgotten
    of_answers = True

    def readings(self, inputs: Inputs, settings: ForgettingSettings) -> list[Reading]:
        choices = [CHOICES] if settings.choices and all(item.choices for item in inputs.data.knowledge) else []
        return [STATEMENTS, QUESTIONS, *choices]

    def summarize(self, records: Recorded, settings: Settings) -> Forgotten:
        buckets = tuple(bucket for readout in READOUTS for bucket in _buckets(records, readout))
        return Forgotten(buckets, tuple(_agreement(records, *pair) for pair in combinations(filter(records.arms, READOUTS), 2)))

    def tables(self, summary: Forgotten, header: Header) -> list[Table]:
        tables = []
        left_out = _left_out(summary)
        for readout, (_, how) in READOUTS.items():
            if readout in left_out:
                continue
            rows = [bucket for bucket in summary.buckets if bucket.readout == readout and bucket.forgotten is not None]
            columns: dict[str, dict[str, str]] = {}
            for one in rows:
                columns.setdefault(one.bucket, {})[one.arm] = cell(one.forgotten, 100)
            ties: dict[str, int] = {}
            for one in rows:
                if one.tied is not None:
                    ties[one.arm] = ties.get(one.arm, 0) + one.tied
            if ties:
                columns["tied"] = {arm: str(count) for arm, count in ties.items()}
            title = f"Forgotten of what the base knew, {how} (percentage points)"
            same = [_in_words(agreement) for agreement in left_out.values() if agreement.first == readout]
            tables += table(title, [one.arm for one in rows], columns, " ".join(["Base minus arm, by exposure; above zero is forgotten.", *same]))
        return tables

    def charts(self, summary: Forgotten, header: Header) -> Iterable[Chart]:
        rows = [bucket for bucket in summary.buckets if bucket.readout == STATEMENTS.name]
        if not rows:
            return
        labels = list(dict.fromkeys(one.bucket for one in rows))
        x = exposure_axis(labels)
        arms = header.ordered(list(dict.fromkeys(one.arm for one in rows)))
        shares: list[Series] = []
        lost: list[Series] = []
        apart = [arm for arm in arms if arm == header.base or header.kinds[arm] == "expert"]
        beside = [arm for arm in arms if arm not in apart]
        for arm in apart:
            known = [one.share for one in rows if one.arm == arm]
            shares.append(Series("band", all_scaled(known, 100), tuple(map(float, range(len(labels)))), label=arm))
        for place, arm in enumerate(beside):
            places = tuple(number + (place - (len(beside) - 1) / 2) * 0.06 for number in range(len(labels)))
            less = [one.forgotten or Value(None) for one in rows if one.arm == arm]
            lost.append(Series("line", all_scaled(less, 100), places, label=arm))
        panels = [Panel(tuple(shares), "what the base knows", x, Axis("statements continued correctly (%)"))]
        if beside:
            panels.append(Panel(tuple(lost), "what an arm forgot of it, paired", x, Axis("base minus arm (points)"), zero=True))
        yield Chart("knowledge-by-exposure", f"{header.title}: knowledge by exposure, 95 % intervals", tuple(panels), paired=True, across=2)

    def rows(self, summary: Forgotten) -> list[dict[str, Any]]:
        return [
            row(one.arm, f"{READOUTS[one.readout][0]}/{one.bucket}", one.forgotten, one.n, one.unparsed, one.tied)
            for one in summary.buckets
            if one.forgotten is not None
        ]


def _buckets(records: Recorded, readout: str) -> list[Bucket]:
    arms = records.arms(readout)
    if not arms:
        return []
    base = arms.index(records.study.base_arm)
    found = []
    for label in familiarity(records(readout, records.study.base_arm)[0]["popularity"].tolist()).labels:
        value, draws = estimate_shares(records, readout, in_bucket(label))
        for position, arm in enumerate(arms):
            share = value_of(interval(value[position], draws[position], SHARE))
            less = None if position == base else value_of(interval(value[base] - value[position], draws[base] - draws[position], DIFFERENCE))
            found.append(Bucket(readout, label, arm, share, less, **counts(records(readout, arm), in_bucket(label))))
    return found


def _agreement(records: Recorded, first: str, second: str) -> Agreement:
    arms = [arm for arm in records.arms(first) if records.has(second, arm)]
    right = [
        np.concatenate([(frame["right"] == 1).to_numpy() for arm in arms for tunings in records.tunings(name, arm) for frame in tunings])
        for name in (first, second)
    ]
    return Agreement(first, second, float((right[0] == right[1]).mean()), len(right[0]))


# What is shown


def _left_out(summary: Forgotten) -> dict[str, Agreement]:
    """The read-outs that tell the same as an earlier one that is shown, with that agreement."""
    found: dict[str, Agreement] = {}
    for agreement in summary.agreements:
        if agreement.share >= ALIKE and agreement.first not in found:
            found.setdefault(agreement.second, agreement)
    return found


def _in_words(agreement: Agreement) -> str:
    how = READOUTS[agreement.second][1].partition(",")[0].capitalize()
    return f"{how} agrees in {100 * agreement.share:.1f} % of {agreement.n} answers and is not shown."


register(Forgetting())
