"""Erosion: the verdict on "direct tuning erodes what lower layers hold", arm by arm, by the clauses of `probes/verdict.py`.

Controls are arms of the same study that differ from the judged arm in one setting: `shuffled: true`, and `frozen: lower` selected to match it
(`select: {match: ARM}`). The state of a clause is "cannot tell" if the study lacks its control or its reading, or if the arm was tuned only once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from evals.display.cells import Table, cell, over
from evals.kinds import Direct
from evals.measures.density import density_change
from evals.measures.inputs import Inputs
from evals.measures.knowledge import STATEMENTS
from evals.measures.measure import Measure, Reading, Settings
from evals.measures.recoverability import RecoverabilityFound, Recovered
from evals.measures.registry import measures, register
from evals.measures.restoration import restored_by_seed
from evals.measures.states import layers_of
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.selection import Choices, recorded
from evals.statistics.estimates import intervals, means_by_unit
from evals.statistics.power import Needs, needs
from evals.statistics.value import Value
from evals.study import Study
from finetune.recipe import Tuning
from probes.internals.blocks import thirds
from probes.verdict import FAMILY, RULE, Clause, measured, p_value, p_values, states, verdict

CLAIM = "direct tuning erodes what lower layers hold"
SCALES = {  # for each clause: the factor of its numbers, their digits, and the unit after scaling
    "density": (1000.0, 1, "thousandths of effective rank"),
    "restoration": (100.0, 1, "points of probability"),
    "freezing": (100.0, 1, "points right"),
    "savings": (1.0, 2, "share of the steps"),
}
# Where a clause's p value must lie if it is the smallest of all clauses of the rule, two-sided: what `needs` is computed for.
STRICTEST = 2 * FAMILY / len(RULE)
JUDGED_BY = ("density", "restoration", "recoverability")
STATES = {"fails": "Failed", "holds": "held", "cannot tell": "cannot tell"}


@dataclass(frozen=True)
class Judged:
    """One clause of an arm's verdict: its claim, its interval, its state (holds, fails, cannot tell), and the seeds that would decide it. `p` is that
    of an effect large enough to count, one-sided and corrected by Holm for all clauses."""

    clause: str
    claim: str
    state: str
    value: Value
    threshold: float
    needs: int | None
    note: str
    runs: int = 0
    p: float | None = None


@dataclass(frozen=True)
class Verdict:
    arm: str
    claim: str
    verdict: str
    clauses: tuple[Judged, ...]


@dataclass(frozen=True)
class ErosionFound:
    verdicts: tuple[Verdict, ...]


class Erosion(Measure[ErosionFound]):
    name = "erosion"
    question = "Does direct tuning erode what lower layers hold? The verdict, from density, restoration, freezing and relearning."
    controls = "Random deltas; tuning on shuffled answers; as much change elsewhere; the lower half frozen at the same task score."
    needs = frozenset({"knowledge.statement", "knowledge.choices", "knowledge.popularity"})
    built_on = ("density", "drift", "lens", "restoration", "recoverability")
    summary = ErosionFound

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        return [each for name in JUDGED_BY for each in measures()[name].readings(inputs, inputs.study.settings_of(name))]

    def summarize(self, records: Recorded, settings: Settings) -> ErosionFound:
        base = records.study.base_arm
        arms = [arm for arm in records.arms("states") if arm in records.study.rows and arm != base and not _is_control(records.study, arm)]
        return ErosionFound(tuple(_judge(records, arm) for arm in arms))

    def tables(self, summary: ErosionFound, header: Header) -> list[Table]:
        return [_verdict_table(row, header) for row in summary.verdicts]

    def clauses(self, summary: ErosionFound) -> Mapping[str, Sequence[Clause]]:
        return {row.arm: [_clause_of(one) for one in row.clauses] for row in summary.verdicts}


# What is concluded


def _judge(records: Recorded, arm: str) -> Verdict:
    runs = tuning_runs(records, arm)
    relearned: RecoverabilityFound = records.summary("recoverability")
    of_arm = next((row for row in relearned.arms if row.arm == arm), None)
    clauses = [*_density(records, arm, runs), *_restoration(records, arm, runs), _freezing(records, arm, runs), _savings(of_arm, runs)]
    return Verdict(arm, CLAIM, verdict(clauses), judged(clauses))


def judged(clauses: Sequence[Clause]) -> tuple[Judged, ...]:
    """All clauses of one verdict, with their states and corrected p values."""
    return tuple(
        Judged(
            one.name,
            one.claim,
            state,
            Value(one.value, one.low, one.high),
            one.threshold,
            one.needs if state == "cannot tell" else None,
            one.note,
            one.runs,
            p,
        )
        for one, state, p in zip(clauses, states(clauses), p_values(clauses), strict=True)
    )


def _clause_of(one: Judged) -> Clause:
    value = one.value
    return RULE[one.clause]._replace(value=value.value, low=value.low, high=value.high, runs=one.runs, needs=one.needs, note=one.note)


def tuning_runs(records: Recorded, arm: str) -> int:
    """How many times the arm was tuned: once with a `path`, whatever the seeds; otherwise the number of seeds whose states differ."""
    spec = records.study.arms[records.study.arm_settings[arm].arm]
    if isinstance(spec, Direct) and spec.path is not None:
        return 1
    return len({frame["value"].to_numpy(float).tobytes() for frame in records("states", arm)})


def _density(records: Recorded, arm: str, runs: int) -> list[Clause]:
    low = list(thirds(layers_of(records("states", arm)[0]))["low"])
    seeds = density_change(records, arm, [("residual", "last", low)])
    clauses = [_clause(records, "density", seeds, 0, None, runs), _clause(records, "density/random", seeds, 0, 1, runs)]
    twin = _shuffled(records.study, arm)
    if twin is None:
        return [*clauses, measured("density/shuffled", None, runs, note="no arm is the same with shuffled: true")]
    others = density_change(records, twin, [("residual", "last", low)])
    beside = [np.stack([one[:, 0], other[:, 0]], axis=1) for one, other in zip(seeds, others, strict=True)]
    return [*clauses, _clause(records, "density/shuffled", beside, 0, 1, runs, note=f"minus {twin}")]


def _restoration(records: Recorded, arm: str, runs: int) -> list[Clause]:
    if not records.has("restoration", arm):
        return [measured(name, None, runs, note="restoration was not measured") for name in ("restoration", "restoration/elsewhere")]
    names, seeds = restored_by_seed(records, arm)
    first = _clause(records, "restoration", seeds, names.index(("shapley", "low")), names.index(("shapley", "high")), runs)
    control = next((names.index((kind, "low")) for kind in ("same-norm", "same-number") if (kind, "low") in names), None)
    if control is None:
        return [first, measured("restoration/elsewhere", None, runs, note="more than half of the change is in the low block")]
    alone = names.index(("recovery", "low"))
    return [first, _clause(records, "restoration/elsewhere", seeds, alone, control, runs, note=f"minus {names[control][0]}")]


def _freezing(records: Recorded, arm: str, runs: int) -> Clause:
    twin = _frozen(records.study, arm)
    if twin is None or not records.has(STATEMENTS.name, arm):
        missing = "no arm with its lower half frozen is selected to match" if twin is None else "knowledge was not measured"
        return measured("freezing", None, runs, note=missing)
    seeds = []
    for frame, other in zip(records(STATEMENTS.name, twin), records(STATEMENTS.name, arm), strict=True):
        known = (frame["popularity"] != 0).to_numpy()
        right = np.stack([frame["right"], other["right"]], axis=1).astype(float)[known]
        seeds.append(means_by_unit(frame[known], right))
    return _clause(records, "freezing", seeds, 0, 1, runs, note=f"{twin} minus {arm}")


def _savings(row: Recovered | None, runs: int) -> Clause:
    if row is None:
        return measured("savings", None, runs, note="recoverability was not measured")
    saved = row.savings
    if saved is None or saved.value is None or saved.low is None or saved.high is None:
        nothing = row.lost.low is None or row.lost.low <= 0
        return measured("savings", None, runs, note="nothing was lost beyond noise" if nothing else "not every curve could be read")
    return measured("savings", (saved.value, saved.low, saved.high), runs)


def _clause(records: Recorded, name: str, seeds: Sequence[np.ndarray], one: int, other: int | None, runs: int, note: str = "") -> Clause:
    """The clause for the difference of two columns, or for one column (`other` None), with the number of seeds that would decide it."""
    difference = [seed[:, [one]] if other is None else seed[:, [one]] - seed[:, [other]] for seed in seeds]
    found = records.estimate(difference)
    (value,) = intervals(found)
    if not np.isfinite(value.low):
        return measured(name, None, runs, note="no interval could be taken")
    clause = measured(name, value, runs, note=note)
    if p_value(clause) is None:
        return clause
    effect = abs(clause.threshold - clause.boundary)
    wanted = needs(value.value, found.draws[0], len(seeds), len(difference[0]), records.study.same_items, effect, STRICTEST)
    if wanted.of == "units":
        return clause._replace(note=f"{note}; {wanted} needed, whatever the seeds".removeprefix("; "))
    return clause._replace(needs=wanted.number)


def _tuning(study: Study, label: str) -> tuple[Direct, Tuning | None]:
    """An arm and its tuning: the one that was selected beforehand, or its first candidate if it is selected in every run."""
    point = study.rows[label]
    arm = study.arms[point.arm]
    assert isinstance(arm, Direct)
    choices = recorded(study) or Choices()
    chosen = choices[point.arm].tuning if point.arm in choices else None
    if isinstance(chosen, Tuning):
        return arm, chosen
    return arm, arm.tuning if arm.select is not None else arm.settings(point.arm)[label][1].tuning


def _is_control(study: Study, label: str) -> bool:
    _, tuning = _tuning(study, label)
    return tuning is not None and (tuning.shuffled or tuning.frozen is not None)


def _shuffled(study: Study, label: str) -> str | None:
    """The arm with the same tuning on shuffled answers."""
    _, tuning = _tuning(study, label)
    wanted = None if tuning is None else tuning.model_copy(update={"shuffled": True})
    return next((other for other in study.direct_settings if wanted is not None and _tuning(study, other)[1] == wanted), None)


def _frozen(study: Study, label: str) -> str | None:
    """The arm with the lower half frozen whose setting was selected to match this one's task score."""
    for other in study.direct_settings:
        arm, tuning = _tuning(study, other)
        if arm.matched == label and tuning is not None and tuning.frozen == "lower":
            return other
    return None


# What is shown


def _verdict_table(row: Verdict, header: Header) -> Table:
    """The verdict, its clauses, and what would have refuted them."""
    frame = pd.DataFrame([_clause_cells(place, clause) for place, clause in enumerate(row.clauses, start=1)], dtype=str)
    places = {state: [str(place) for place, clause in enumerate(row.clauses, start=1) if clause.state == state] for state in STATES}
    found = "; ".join(f"{words}: {', '.join(places[state]) or 'none'}" for state, words in STATES.items())
    note = (
        f"{found}. 95 % intervals, {over(header.runs)}. p: of an effect that counts or a larger one, one-sided, corrected by Holm for all clauses. "
        f"A clause fails if p is at most {FAMILY:g}, so that a claim whose clauses are all true is refuted in at most 5 % of studies. It holds if it "
        "does not fail and its whole interval is in the range 'holds if all'. The claim is supported if every clause holds, not supported if any "
        "one fails, and otherwise underpowered. One seed describes this model and this run, and judges nothing. Needed: the number of seeds that "
        "would decide the clause four times in five, if the effect is the least that counts, or zero."
    )
    outcome = f": {row.verdict}" if row.verdict.startswith("cannot tell") else f" is {row.verdict}"
    return Table(f"Verdict, {row.arm}: '{row.claim}'{outcome}", frame, note)


def _clause_cells(place: int, clause: Judged) -> dict[str, str]:
    scale, digits, unit = SCALES[clause.clause.partition("/")[0]]
    rule = RULE[clause.clause]
    boundary, threshold = (f"{number * scale:.{digits}f}" for number in (rule.boundary, clause.threshold))
    return {
        "claimed": f"{place}. {clause.claim}",
        "value": cell(clause.value, scale, digits),
        "in": unit,
        "counts if": f"{rule.side} {threshold}",
        "p": "" if clause.p is None else f"{clause.p:.2g}",
        "holds if all": f"{rule.side} {boundary}",
        "state": clause.state,
        "needed": "" if clause.state != "cannot tell" else "n/a" if clause.needs is None else str(Needs(clause.needs, "seeds")),
        "note": clause.note,
    }


register(Erosion())
