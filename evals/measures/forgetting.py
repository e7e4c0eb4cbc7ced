"""Forgetting: what an arm no longer knows of what the base knew, by exposure, with three read-outs (see `probes/knowledge/familiarity.py`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
class Forgotten:
    buckets: tuple[Bucket, ...]


class Forgetting(Measure[Forgotten]):
    name = "forgetting"
    question = "What does an arm no longer know of what the base knew, by how often pretraining stated it?"
    controls = "Paired over the same items; no fact is in the tuning data; facts that were never stated are the floor."
    needs = frozenset({"knowledge.statement", "knowledge.popularity"})
    summary = Forgotten

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        choices = [CHOICES] if all(item.choices for item in inputs.data.knowledge) else []
        return [STATEMENTS, QUESTIONS, *choices]

    def summarize(self, records: Recorded, settings: Settings) -> Forgotten:
        return Forgotten(tuple(bucket for readout in READOUTS for bucket in _buckets(records, readout)))

    def tables(self, summary: Forgotten, header: Header) -> list[Table]:
        tables = []
        for readout, (_, how) in READOUTS.items():
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
            tables += table(title, [one.arm for one in rows], columns, "Base minus arm, by exposure; above zero is forgotten.")
        return tables

    def charts(self, summary: Forgotten, header: Header) -> Iterable[Chart]:
        rows = [bucket for bucket in summary.buckets if bucket.readout == STATEMENTS.name]
        if not rows:
            return
        labels = list(dict.fromkeys(one.bucket for one in rows))
        lines = []
        arms = header.ordered(list(dict.fromkeys(one.arm for one in rows)))
        for place, arm in enumerate(arms):
            x = tuple(number + (place - (len(arms) - 1) / 2) * 0.03 for number in range(len(labels)))
            lines.append(Series("line", all_scaled([one.share for one in rows if one.arm == arm], 100), x, label=arm))
        panel = Panel(tuple(lines), x=exposure_axis(labels), y=Axis("statements continued correctly (%)"))
        yield Chart("knowledge-by-exposure", f"{header.title}: knowledge by exposure, 95 % intervals", (panel,))

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


register(Forgetting())
