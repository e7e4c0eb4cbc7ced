"""A new measure in one module: how many words an arm's answers to the task have."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import Field

from evals.display.cells import Table, cell, table
from evals.display.chart import Axis, Chart, Panel, Series
from evals.measures.answers import Generated
from evals.measures.inputs import Inputs
from evals.measures.measure import Measure, Reading, Settings
from evals.measures.registry import register
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import intervals, means_by_unit
from evals.statistics.value import Value, value_of

ANSWERS = Generated("answer_length", "test", "question")


class LengthSettings(Settings):
    unit: int = Field(default=1, ge=1, description="so many words count as one")


@dataclass(frozen=True)
class Lengths:
    arms: tuple[tuple[str, Value], ...]


class AnswerLength(Measure[Lengths]):
    name = "answer_length"
    question = "How long are an arm's answers?"
    needs = frozenset({"test"})
    settings = LengthSettings
    summary = Lengths

    def readings(self, inputs: Inputs, settings: LengthSettings) -> list[Reading]:
        return [ANSWERS]

    def summarize(self, records: Recorded, settings: LengthSettings) -> Lengths:
        found = []
        for arm in records.arms(ANSWERS.name):
            frames = records(ANSWERS.name, arm)
            words = [means_by_unit(frame, frame["text"].str.split().str.len().to_numpy(float)[:, None] / settings.unit) for frame in frames]
            found.append((arm, value_of(intervals(records.estimate(words), (0.0, float("inf")))[0])))
        return Lengths(tuple(found))

    def tables(self, summary: Lengths, header: Header) -> list[Table]:
        return table(
            "Answer length", [arm for arm, _ in summary.arms], {"words": {arm: cell(value) for arm, value in summary.arms}}, "Words an answer."
        )

    def charts(self, summary: Lengths, header: Header) -> Iterator[Chart]:
        bars = tuple(Series("bar", (value,), (float(place),), label=arm) for place, (arm, value) in enumerate(summary.arms))
        yield Chart("answer-length", f"{header.title}: words an answer", (Panel(bars, y=Axis("words")),))


register(AnswerLength())
