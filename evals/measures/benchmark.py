"""Benchmark: any task of the lm-eval harness, asked of every arm. The prompts are the task's own; `evals/harness/benchmarks.py` asks and judges."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from evals.display.cells import Table
from evals.display.chart import Chart, arm_bars, scaled
from evals.measures.inputs import Inputs
from evals.measures.measure import Frames, Measure, Progress, Reading, Settings, Share
from evals.measures.registry import register
from evals.measures.shares import DIFFERENCE, SHARE, ArmShare, can_be_known, counts, estimate_shares, row, share_table
from evals.measures.subjects import Outputs
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.intervals import interval
from evals.statistics.value import Value, value_of
from evals.study import expanded

if TYPE_CHECKING:  # the harness takes seconds to import
    from evals.harness.benchmarks import Benchmark as Loaded

NAME = "benchmark"


class BenchmarkSettings(Settings):
    """Which tasks are asked, and how."""

    tasks: tuple[str, ...] = Field(default=("proxytune_capitals",), min_length=1, description="tasks of the harness, by name")
    limit: int | None = Field(default=None, ge=1, description="so many items of each task, spread evenly over it; default: all")
    num_fewshot: int | None = Field(default=None, ge=0, description="examples before each question; default: as the task says")
    metrics: dict[str, str] = Field(default={}, description="the metric that says what is right, by task; default: its first one")
    folder: str | None = Field(default=None, description="folder of YAML files of your own tasks, relative to the study file")

    @model_validator(mode="after")
    def _coherent(self) -> "BenchmarkSettings":
        for name in self.metrics:
            if name not in self.tasks:
                raise ValueError(f"metrics: {name!r} is not among the tasks ({', '.join(self.tasks)})")
        return self


@dataclass(frozen=True)
class Scored(Reading):
    """One task, asked of every mixture. The frame has the reading's name and one row per item."""

    task: str
    limit: int | None = None
    num_fewshot: int | None = None
    metric: str | None = None
    folder: str | None = None
    version: ClassVar[int] = 1
    subject: ClassVar[type[Outputs]] = Outputs

    def frames(self, subject: Outputs, inputs: Inputs) -> tuple[str, ...]:
        return (self.name,)

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        return {"benchmark": self._loaded(inputs).content}

    def first_prompt(self, inputs: Inputs) -> str:
        return f"first prompt {json.dumps(self._loaded(inputs).first_prompt)}"

    def steps(self, subject: Outputs, inputs: Inputs) -> int:
        return len(self._loaded(inputs)) * len(subject.mixtures)

    def read(self, subject: Outputs, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        from evals.harness.benchmarks import answer_benchmark

        study = inputs.study
        options: dict[str, Any] = {"batch_size": study.batch_size, "batch_tokens": study.batch_tokens, "progress": progress}
        found = answer_benchmark(self._loaded(inputs), subject.members, subject.mixtures, **options)
        return {arm: {self.name: frame} for arm, frame in found.items()}

    def _loaded(self, inputs: Inputs) -> "Loaded":
        from evals.harness.benchmarks import load_benchmark

        folder = None if self.folder is None else inputs.folder / expanded(self.folder)
        options: dict[str, Any] = {"folder": folder, "metric": self.metric, "limit": self.limit, "shots": self.num_fewshot}
        loaded: Loaded = inputs.once(self, lambda: load_benchmark(self.task, **options))
        return loaded


@dataclass(frozen=True)
class Score:
    """One arm's share of a task's items, and the arm minus the base, paired (None for the base itself)."""

    task: str
    arm: str
    share: Value
    change: Value | None
    n: int
    unparsed: int
    tied: int | None = None


@dataclass(frozen=True)
class Scores:
    scores: tuple[Score, ...]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(one.task for one in self.scores))


class Benchmark(Measure[Scores]):
    name = NAME
    question = "How does an arm score on tasks of the lm-eval harness (`settings: {benchmark: {tasks: [...], limit: 200}}`)?"
    controls = "The task's own prompts and metric, the same items for every arm; all mixtures are answered from the same passes of their members."
    role = "kept"
    settings = BenchmarkSettings
    summary = Scores
    of_answers = True

    def readings(self, inputs: Inputs, settings: BenchmarkSettings) -> list[Reading]:
        how = (settings.limit, settings.num_fewshot)
        return [Scored(f"{NAME}/{task}", task, *how, settings.metrics.get(task), settings.folder) for task in settings.tasks]

    def summarize(self, records: Recorded, settings: BenchmarkSettings) -> Scores:
        return Scores(tuple(score for task in settings.tasks for score in _scores(records, task)))

    def tables(self, summary: Scores, header: Header) -> list[Table]:
        tables = []
        for task in summary.tasks:
            arms = [ArmShare(one.arm, one.share, one.n, one.unparsed, one.tied) for one in summary.scores if one.task == task]
            tables += share_table(f"Benchmark {task}", task, arms, header)
        return tables

    def charts(self, summary: Scores, header: Header) -> Iterable[Chart]:
        panels = []
        for task in summary.tasks:
            changed = {one.arm: scaled(one.change, 100) for one in summary.scores if one.task == task and one.change is not None}
            panels.append(arm_bars(changed, NAME, task, "arm minus base (points)"))
        if panels and any(panel.y.ticks for panel in panels):
            yield Chart(NAME, f"{header.title}: benchmarks, paired 95 % intervals", tuple(panels), paired=True, across=2)

    def rows(self, summary: Scores) -> list[dict[str, Any]]:
        return [row(one.arm, f"{NAME}/{one.task}", one.share, one.n, one.unparsed, one.tied) for one in summary.scores]

    def shares(self, records: Recorded) -> Mapping[str, Share]:
        frames = [f"{NAME}/{task}" for task in records.study.settings_of(NAME).tasks]
        return {frame: Share(estimate_shares(records, frame, same_items=True), records.by_seed(frame)) for frame in frames}


def _scores(records: Recorded, task: str) -> Iterable[Score]:
    frame = f"{NAME}/{task}"
    value, draws = estimate_shares(records, frame, same_items=True)
    arms = records.arms(frame)
    base = arms.index(records.study.base_arm)
    for place, arm in enumerate(arms):
        share = value_of(interval(value[place], draws[place], SHARE))
        change = None if place == base else value_of(interval(value[place] - value[base], draws[place] - draws[base], DIFFERENCE))
        yield Score(task, arm, share, change, **counts(records(frame, arm), can_be_known))


register(Benchmark())
