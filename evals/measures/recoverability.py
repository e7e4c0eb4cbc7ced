"""Recoverability: how fast lost knowledge returns when it is taught again. Mathematics: `probes/recoverability.py`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from evals.display.cells import Columns, Table, cell, over, table
from evals.display.chart import Axis, Chart, Panel, Series, all_scaled
from evals.measures.inputs import Inputs, as_content, common_columns
from evals.measures.measure import Frames, Measure, Progress, Reading, Settings
from evals.measures.registry import register
from evals.measures.subjects import Pair
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import intervals, levels, means_by_unit, over_seeds
from evals.statistics.intervals import Interval, interval
from evals.statistics.value import Value, value_of, values_of
from finetune.items import Item
from probes.knowledge.candidates import Known
from probes.recoverability import CURVES, FORGOTTEN, NEVER, Curve, Relearning, Savings, relearn, savings, spurious

RESAMPLES = 300  # of units, for the intervals of the steps: each resample needs a whole curve
WORDS = {"forgotten": "exposed facts, taught again", "never exposed": "facts never exposed, taught", "unrelated": "exposed facts, ten others taught"}


class RelearningSettings(Settings):
    """How knowledge is taught again."""

    learning_rate: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    steps: int = Field(default=32, ge=1, description="at most; a fact that is not regained by then counts as not regained")
    batch_size: int = Field(default=16, ge=1)


@dataclass(frozen=True, kw_only=True)
class Relearned(Reading):
    """The relearning curves of a tuned model. Frame `recoverability`: one row for each curve, step and item."""

    settings: RelearningSettings
    name: str = "recoverability"
    version: ClassVar[int] = 1
    subject: ClassVar[type[Pair]] = Pair

    def frames(self, subject: Pair, inputs: Inputs) -> tuple[str, ...]:
        return () if subject.tuned is None else ("recoverability",)

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        return {"items": as_content(inputs.data.knowledge), "relearning": self.settings.model_dump(), "ending": inputs.data.ending}

    def steps(self, subject: Pair, inputs: Inputs) -> int:
        return 3 * self.settings.steps

    def read(self, subject: Pair, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        assert subject.tuned is not None
        of_base = inputs.known(subject.base)
        how = Relearning(
            self.settings.learning_rate,
            self.settings.steps,
            self.settings.batch_size,
            ending=inputs.data.ending,
            seed=inputs.seed,
            batch_tokens=inputs.study.batch_tokens,
        )
        curves = relearn(subject.tuned, inputs.data.knowledge, of_base, how, progress)
        common = common_columns(inputs.data.knowledge).assign(base_right=of_base.right, base_probability=of_base.probability)
        rows = []
        for name, curve in curves.items():
            for point, step in enumerate(curve.steps):
                these = common.iloc[curve.indices].assign(curve=name, step=step, item=curve.indices)
                rows.append(these.assign(right=curve.right[point], probability=curve.probability[point]))
        return {subject.label: {"recoverability": pd.concat(rows, ignore_index=True)}}


@dataclass(frozen=True)
class RelearningCurve:
    """The right candidate's probability after each step, and what the base knows of the same items."""

    name: str
    steps: tuple[int, ...]
    probability: tuple[Value, ...]
    base: Value


@dataclass(frozen=True)
class Recovered:
    """One arm. `lost`: base minus arm in the right candidate's probability before the first step. For each seed, the steps to regain it (`relearned`)
    and the steps in which new facts gain as much (`learned`). `savings`: 1 minus their ratio; `bound` says whether a seed's savings are exact or a
    bound. `brought_back`: the share of the loss that ten unrelated facts bring back. `savings` and `brought_back` are None where the loss is within
    noise, or a curve could not be read."""

    arm: str
    lost: Value
    savings: Value | None
    brought_back: Value | None
    bound: tuple[str, ...]
    relearned: tuple[float | None, ...]
    learned: tuple[float | None, ...]
    curves: tuple[RelearningCurve, ...]


@dataclass(frozen=True)
class RecoverabilityFound:
    arms: tuple[Recovered, ...]


class Recoverability(Measure[RecoverabilityFound]):
    name = "recoverability"
    question = "How fast does lost knowledge return when it is taught again?"
    controls = "Facts that were never exposed, taught for as many steps; ten unrelated facts; facts drawn by the seed."
    needs = frozenset({"knowledge.statement", "knowledge.choices", "knowledge.popularity"})
    settings = RelearningSettings
    summary = RecoverabilityFound

    def readings(self, inputs: Inputs, settings: RelearningSettings) -> list[Reading]:
        return [Relearned(settings=settings)]

    def summarize(self, records: Recorded, settings: RelearningSettings) -> RecoverabilityFound:
        return RecoverabilityFound(tuple(_recovered(records, arm) for arm in records.arms("recoverability")))

    def tables(self, summary: RecoverabilityFound, header: Header) -> list[Table]:
        rows = {row.arm: row for row in summary.arms}
        columns: Columns = {"lost (points of probability)": {arm: cell(row.lost, 100) for arm, row in rows.items()}}
        columns["steps, relearned"] = {arm: _steps(row.relearned) for arm, row in rows.items()}
        columns["steps, learned anew"] = {arm: _steps(row.learned) for arm, row in rows.items()}
        columns["savings"] = {arm: _savings(row) for arm, row in rows.items()}
        columns["unrelated facts bring back (% of the loss)"] = {arm: cell(row.brought_back, 100) for arm, row in rows.items()}
        note = (
            "Steps of tuning on plain statements: until exposed facts have 95 % of the probability that the base gives them (relearned), and until "
            "facts that were never exposed have gained as much (learned anew); n/a: not within the steps given. Savings: 1 minus their ratio; 1: "
            "nothing had to be relearned; 0: as slow as new facts. What ten unrelated facts bring back "
            f"was never lost. The last two are n/a where the loss is within noise. 95 % intervals, {over(header.runs)}."
        )
        return table("Recoverability: how fast lost knowledge returns", header.ordered(list(rows)), columns, note)

    def charts(self, summary: RecoverabilityFound, header: Header) -> Iterable[Chart]:
        panels = []
        for row in summary.arms:
            marks = []
            ticks: tuple[tuple[float, str], ...] = ()
            for curve in row.curves:
                x = tuple(float(np.log2(step + 1)) for step in curve.steps)
                ticks = tuple(zip(x, map(str, curve.steps), strict=True))
                marks.append(Series("band", all_scaled(curve.probability, 100), x, label=WORDS[curve.name]))
                if curve.name != NEVER:
                    marks.append(Series("level", all_scaled([curve.base], 100), group=WORDS[curve.name]))
            x_axis = Axis("steps of tuning on plain statements (log scale)", ticks)
            panels.append(Panel(tuple(marks), row.arm, x_axis, Axis("right candidate's probability (%)", limits=(0.0, 100.0))))
        if panels:
            title = f"{header.title}: how fast knowledge returns, with 95 % bands"
            yield Chart("recoverability", title, tuple(panels), "dotted: what the base knows of the same facts", shared=True)


# What is concluded


class Curves(NamedTuple):
    """A record's curves, what the base knows of every item, every item's unit ("none" if no curve has the item), and the units' strata."""

    curves: dict[str, Curve]
    base: Known
    units: np.ndarray
    strata: dict[str, int]


def _recovered(records: Recorded, arm: str) -> Recovered:
    """Intervals resample units within seeds; with several seeds they are at least as wide as the t interval over the seeds."""
    frames = records("recoverability", arm)
    before = [frame[(frame["curve"] == FORGOTTEN) & (frame["step"] == 0)] for frame in frames]
    losses = [means_by_unit(part, (part["base_probability"] - part["probability"]).to_numpy()[:, None]) for part in before]
    (lost,) = intervals(records.estimate(losses))
    read = [_read(frame) for frame in frames]
    of_seeds = [_relearned(seed) for seed in read]
    saved = brought_back = None
    if lost.low > 0:
        again = [[_relearned(_resampled(seed, draw)) for seed in read] for draw in range(RESAMPLES)]
        saved = _return([one.value for one, _ in of_seeds], [[one.value for one, _ in seeds] for seeds in again], most=1.0)
        brought_back = _return([share for _, share in of_seeds], [[share for _, share in seeds] for seeds in again])
    relearned, learned = (tuple(getattr(one, name) for one, _ in of_seeds) for name in ("relearnt", "learnt"))
    bounds = tuple(sorted({one.bound for one, _ in of_seeds}))
    return Recovered(arm, value_of(lost), saved, brought_back, bounds, relearned, learned, tuple(_curves(records, frames)))


def _curves(records: Recorded, frames: Sequence[pd.DataFrame]) -> Iterator[RelearningCurve]:
    """The curves that every seed of the arm has."""
    for name in CURVES:
        parts = [frame[frame["curve"] == name] for frame in frames]
        if any(part.empty for part in parts):
            continue
        tables = [part.pivot(index=["unit", "item", "popularity"], columns="step", values="probability").astype(float) for part in parts]
        found = intervals(records.estimate([means_by_unit(each.reset_index(), each.to_numpy()) for each in tables]))
        known = float(np.mean([part.drop_duplicates("item")["base_probability"].mean() for part in parts]))
        clipped = values_of(Interval(*np.clip(value, 0, 1)) for value in found)
        yield RelearningCurve(name, tuple(int(step) for step in tables[0].columns), tuple(clipped), Value(known))


def _read(frame: pd.DataFrame) -> Curves:
    count = int(frame["item"].max()) + 1
    base = Known(np.zeros(count, bool), np.zeros(count))
    base.right[frame["item"]], base.probability[frame["item"]] = frame["base_right"], frame["base_probability"]
    curves = {}
    for name, part in frame.groupby("curve", sort=False):
        right, probability = (part.pivot(index="step", columns="item", values=column) for column in ("right", "probability"))
        indices = [int(item) for item in right.columns]
        curves[str(name)] = Curve([int(step) for step in right.index], indices, right.to_numpy(bool), probability.to_numpy(float))
    units = np.full(count, "none", object)
    units[frame["item"]] = frame["unit"].astype(str)
    return Curves(curves, base, units, dict(zip(np.unique(frame["unit"].astype(str)), levels(frame).tolist(), strict=True)))


def _relearned(read: Curves) -> tuple[Savings, float | None]:
    items = [Item(question=str(unit), answer="none") for unit in read.units]
    return savings(read.curves, read.base), spurious(read.curves, items, read.base)


def _return(of_seeds: Sequence[float | None], again: Sequence[Sequence[float | None]], most: float = np.inf) -> Value | None:
    """The mean over seeds with its interval; `again` holds the seeds' values for resampled units. None if some seed has no value."""
    known = _known(of_seeds)
    drawn = [np.mean(values) for seeds in again if (values := _known(seeds)) is not None]
    if known is None or len(drawn) <= len(again) / 2:
        return None
    of_units = interval(float(np.mean(known)), np.array(drawn))
    if len(known) == 1:
        return value_of(of_units)
    by_seeds = over_seeds(known, (-np.inf, most))
    return value_of(Interval(by_seeds.value, min(by_seeds.low, of_units.low), max(by_seeds.high, of_units.high)))


def _known(values: Sequence[float | None]) -> list[float] | None:
    """The values if none is missing, otherwise None."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _resampled(read: Curves, draw: int) -> Curves:
    """Units resampled within strata, with all their items. Copies of an item are items of their own, but belong to one unit, which must stay on one
    side of a split. The same units are drawn in every seed that has them.
    """
    names, strata = np.array(list(read.strata)), np.array(list(read.strata.values()))
    generator = np.random.default_rng(draw)
    drawn = np.concatenate([generator.choice(names[strata == stratum], (strata == stratum).sum()) for stratum in np.unique(strata)])
    items = [np.flatnonzero(read.units == unit) for unit in drawn]
    source = np.concatenate(items)
    curves = {}
    for name, curve in read.curves.items():
        places = np.full(len(read.units), -1)
        places[curve.indices] = range(len(curve.indices))
        indices = np.flatnonzero(places[source] >= 0)
        columns = places[source[indices]]
        curves[name] = Curve(curve.steps, indices.tolist(), curve.right[:, columns], curve.probability[:, columns])
    base = Known(read.base.right[source], read.base.probability[source])
    copies = {f"{copy}": int(stratum) for copy, stratum in enumerate(np.sort(strata))}
    return Curves(curves, base, np.repeat(list(copies), [len(of_unit) for of_unit in items]), copies)


# What is shown


def _steps(of_seeds: Sequence[float | None]) -> str:
    return ", ".join("n/a" if steps is None else f"{steps:.1f}" for steps in of_seeds)


def _savings(row: Recovered) -> str:
    bound = "" if row.savings is None or row.bound == ("exact",) else f"{' / '.join(row.bound)} "
    return bound + cell(row.savings, 1, 2)


register(Recoverability())
