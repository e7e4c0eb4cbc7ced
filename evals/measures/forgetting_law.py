"""One law of forgetting? Knowledge lost against KL to the base, on the task's prompts and on statements, for every arm, tuned or steered.

Mathematics: `probes/forgetting_law.py`; the rule of the verdict: `LAW_RULE` in `probes/verdict.py`. An expert by itself is no point: it is another
model, which did not have the base's knowledge to lose. Arms that ban words have an infinite KL and are none either.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import ttest_1samp

from evals.display.cells import Table, cell, over, table
from evals.display.chart import Axis, Chart, Panel, Series, all_scaled
from evals.measures.answers import Divergence
from evals.measures.inputs import Inputs
from evals.measures.knowledge import STATEMENTS
from evals.measures.measure import Measure, Reading, Settings
from evals.measures.registry import register
from evals.measures.shares import DIFFERENCE, can_be_known
from evals.measures.verdicts import Scales, clause, verdict_table
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import over_seeds
from evals.statistics.judged import Verdict, judged
from evals.statistics.value import UNKNOWN, Value, value_of
from probes.forgetting_law import along, apart, curve, explained, of_seeds, off_the_curve, rank
from probes.significance import holm
from probes.verdict import FAMILY, LAW_RULE, SMALLEST_KNOWLEDGE, Clause, measured, verdict

PROMPTS = {"distribution/task": "the task's prompts", "distribution": "statements"}  # frames of KL, and where it is measured
CLAIM = "KL to the base on {} decides what is forgotten"
STEERED = ("proxy", "logit_bias")
SCALES: Scales = {"follows": (1.0, 2, "rank correlation"), "explained": (1.0, 2, "R²"), "steered": (100.0, 1, "points right")}
CAMPS = {"proxy": "proxies", "logit_bias": "a logit bias"}
CURVE_POINTS = 60


@dataclass(frozen=True)
class Point:
    """An arm, of the family of arms of one name: its mean KL to the base (nats), the share of knowledge lost (base minus arm), and that share beyond
    the curve through the arms of all other families. `leaves` says that this is at least one in a hundred and that its p, corrected by Holm for all
    arms, is at most .05."""

    arm: str
    family: str
    prompts: str
    kl: Value
    lost: Value
    beyond: Value
    leaves: bool


@dataclass(frozen=True)
class Law:
    """Over all arms: rank correlation of KL and knowledge lost, adjusted R² of the curve, what steered arms lost beyond the curve through the tuned
    ones, and the curve's coefficients (share lost per nat, per nat²)."""

    prompts: str
    points: int
    rank: Value
    explained: Value
    steered: Value
    curve: tuple[float, float] | None


@dataclass(frozen=True)
class Laws:
    laws: tuple[Law, ...]
    points: tuple[Point, ...]
    verdicts: tuple[Verdict, ...]


class ForgettingLaw(Measure[Laws]):
    name = "forgetting_law"
    question = "Does KL to the base tell what an arm forgets, whether it is tuned or steered?"
    controls = "The same items for every arm; each family of arms against the curve through all others; KL on the task's prompts and on statements."
    needs = frozenset({"test", "knowledge.statement", "knowledge.popularity"})
    summary = Laws
    of_answers = True

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        return [STATEMENTS, Divergence("distribution/task", "test", "question"), Divergence("distribution", "knowledge", "statement")]

    def summarize(self, records: Recorded, settings: Settings) -> Laws:
        found = [_law(records, frame, name) for frame, name in PROMPTS.items()]
        laws, points, verdicts = zip(*found, strict=True)
        return Laws(laws, tuple(point for of_prompts in points for point in of_prompts), verdicts)

    def tables(self, summary: Laws, header: Header) -> list[Table]:
        return [*_law_table(summary, header), *_point_table(summary, header), *(verdict_table(one, SCALES, header) for one in summary.verdicts)]

    def charts(self, summary: Laws, header: Header) -> Iterable[Chart]:
        panels = [_panel(law, [point for point in summary.points if point.prompts == law.prompts], header) for law in summary.laws if law.points]
        if panels:
            title = f"{header.title}: knowledge lost against KL to the base, 95 % intervals"
            yield Chart("forgetting-law", title, tuple(panels), across=2)

    def verdicts(self, summary: Laws) -> Sequence[Verdict]:
        return summary.verdicts


# What is concluded


class _Arms(NamedTuple):
    labels: list[str]
    families: list[str]
    steered: np.ndarray
    kl: Float[np.ndarray, "seeds arms"]
    lost: Float[np.ndarray, "seeds arms"]


def _law(records: Recorded, frame: str, name: str) -> tuple[Law, list[Point], Verdict]:
    arms = _arms(records, frame)
    runs = len(arms.kl)
    coefficients = curve(arms.kl.mean(axis=0), arms.lost.mean(axis=0))
    ranks, shares = (of_seeds(statistic, arms.kl, arms.lost) for statistic in (rank, explained))
    steered = apart(arms.kl, arms.lost, arms.steered)
    law = Law(
        name,
        len(arms.labels),
        value_of(over_seeds(ranks.tolist(), (-np.inf, 1.0))),
        value_of(over_seeds(shares.tolist(), (-np.inf, 1.0))),
        UNKNOWN if steered is None else value_of(over_seeds(steered.tolist(), DIFFERENCE)),
        None if np.isnan(coefficients).any() else (float(coefficients[0]), float(coefficients[1])),
    )
    clauses = [
        _clause(records, "follows", ranks, runs),
        _clause(records, "explained", shares, runs),
        _clause(records, "steered/more", steered, runs),
        _clause(records, "steered/less", steered, runs),
    ]
    found = Verdict(f"all arms, {name}", CLAIM.format(name), verdict(clauses, LAW_RULE), judged(clauses))
    return law, list(_points(arms, name)), found


def _arms(records: Recorded, frame: str) -> _Arms:
    """The arms that have a finite KL and knowledge; of arms with the very same records only the first."""
    study = records.study
    base = [_known(each) for each in records(STATEMENTS.name, study.base_arm)]
    labels, families, kls, losts = [], [], [], []
    for arm in records.distinct(frame)[0]:
        setting = study.arm_settings[arm]
        divergences = [each["divergence"].to_numpy(float) for each in records(frame, arm)]
        if arm == study.base_arm or setting.kind == "expert" or not all(np.isfinite(each).all() for each in divergences):
            continue
        labels.append(arm)
        families.append(setting.arm)
        kls.append([each.mean() for each in divergences])
        losts.append([one - _known(each) for one, each in zip(base, records(STATEMENTS.name, arm), strict=True)])
    shape = (len(labels), len(base))
    steered = np.array([study.arm_settings[arm].kind in STEERED for arm in labels], bool)
    return _Arms(labels, families, steered, np.array(kls).reshape(shape).T, np.array(losts).reshape(shape).T)


def _known(frame: pd.DataFrame) -> float:
    """The share right of the items that can be known, units weighing the same."""
    return float(frame[can_be_known(frame)].groupby("unit")["right"].mean().mean())


def _points(arms: _Arms, prompts: str) -> Iterator[Point]:
    beyond = off_the_curve(arms.kl, arms.lost, arms.families)
    leaving = _leaving(beyond)
    for place, arm in enumerate(arms.labels):
        kl, lost, apart_from = (
            over_seeds(values[:, place].tolist(), bounds)
            for values, bounds in ((arms.kl, (0.0, np.inf)), (arms.lost, DIFFERENCE), (beyond, DIFFERENCE))
        )
        yield Point(arm, arms.families[place], prompts, value_of(kl), value_of(lost), value_of(apart_from), bool(leaving[place]))


def _leaving(beyond: Float[np.ndarray, "seeds arms"]) -> np.ndarray:
    """Which arms leave the curve: by what counts, and by a t test over seeds that is corrected by Holm."""
    seeds, arms = beyond.shape
    if seeds < 2 or not arms or np.isnan(beyond).any():
        return np.zeros(arms, bool)
    varies = np.ptp(beyond, axis=0) > 0
    p = np.where(beyond.mean(axis=0) == 0, 1.0, 0.0)  # where seeds do not differ
    p[varies] = ttest_1samp(beyond[:, varies], 0.0).pvalue
    return (holm(p) <= FAMILY) & (np.abs(beyond.mean(axis=0)) >= SMALLEST_KNOWLEDGE)


def _clause(records: Recorded, name: str, values: Float[np.ndarray, " seeds"] | None, runs: int) -> Clause:
    if values is None or not np.isfinite(values).all():
        return measured(name, None, runs, note="there are too few arms")
    return clause(records, name, [np.array([[value]]) for value in values], 0, None, runs)


# What is shown


def _law_table(summary: Laws, header: Header) -> list[Table]:
    columns = {
        "arms": {law.prompts: str(law.points) for law in summary.laws},
        "rank correlation": {law.prompts: cell(law.rank, 1, 2) for law in summary.laws},
        "R² of the curve": {law.prompts: cell(law.explained, 1, 2) for law in summary.laws},
        "steered, beyond the curve of the tuned (points)": {law.prompts: cell(law.steered, 100) for law in summary.laws},
        "arms that leave the curve": {
            law.prompts: ", ".join(point.arm for point in summary.points if point.leaves and point.prompts == law.prompts) or "none"
            for law in summary.laws
        },
    }
    note = (
        "KL(base || arm), at prompts' ends, against knowledge lost, over all arms but experts and arms that ban words. The curve: quadratic, "
        "through the origin. R² is adjusted. Rank correlation and R² are of the arms' means, with intervals by leaving out half of the seeds; the "
        "others t over seeds. A single seed has none. An arm leaves the curve through all other families if it is off by a point or more, with p at "
        f"most {FAMILY:g} after Holm's correction for all arms."
    )
    return table("One law of forgetting?", columns["arms"], columns, note, first="KL on")


def _point_table(summary: Laws, header: Header) -> list[Table]:
    columns: dict[str, dict[str, str]] = {"knowledge lost (points)": {}}
    for law in summary.laws:
        of_prompts = [point for point in summary.points if point.prompts == law.prompts]
        columns["knowledge lost (points)"] |= {point.arm: cell(point.lost, 100) for point in of_prompts}
        columns[f"KL on {law.prompts}"] = {point.arm: cell(point.kl, 1, 3) for point in of_prompts}
        columns[f"beyond the curve, {law.prompts}"] = {point.arm: cell(point.beyond, 100) + (" *" if point.leaves else "") for point in of_prompts}
    note = f"KL in nats. Beyond the curve through the arms of all other families, in points; *: leaves it. t intervals, {over(header.runs)}."
    return table("Arms and the curve", header.ordered([point.arm for point in summary.points]), columns, note)


def _panel(law: Law, points: Sequence[Point], header: Header) -> Panel:
    """Every arm, those of one family joined, and the curve."""
    marks = []
    for family in dict.fromkeys(point.family for point in points):
        chosen = sorted((point for point in points if point.family == family), key=lambda point: point.kl.value or 0.0)
        values, filled = all_scaled([point.lost for point in chosen], 100), tuple(point.leaves for point in chosen)
        label = CAMPS.get(header.kinds[chosen[0].arm], "tuned weights")
        marks.append(Series("line", values, across=tuple(point.kl for point in chosen), label=label, filled=filled))
    if law.curve is not None:
        x = np.linspace(0, max(point.kl.value or 0.0 for point in points), CURVE_POINTS)
        y = 100 * along(np.array(law.curve), x)
        marks.append(Series("step", tuple(Value(float(value)) for value in y), tuple(map(float, x))))
    title = f"KL on {law.prompts}; filled: leaves the curve"
    return Panel(tuple(marks), title, Axis("KL(base || arm), nats"), Axis("knowledge lost (points)"), zero=True)


register(ForgettingLaw())
