"""Verdicts as measures show them: the clauses of a claim with their intervals, their states, and the seeds that would decide them.

The rules and how they are judged: `probes/verdict.py`.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from evals.display.cells import Table, cell, over
from evals.kinds import Direct
from evals.measures.controls import shuffled_twin
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import intervals
from evals.statistics.judged import Judged, Verdict
from evals.statistics.power import Needs, needs
from probes.verdict import ALL_CLAUSES, FAMILY, Clause, measured, p_value, rule_of

Scales = Mapping[str, tuple[float, int, str]]  # for each clause: the factor of its numbers, their digits, and the unit after scaling
STATES = {"fails": "Failed", "holds": "held", "cannot tell": "cannot tell"}


def clause(records: Recorded, name: str, seeds: Sequence[np.ndarray], one: int, other: int | None, runs: int, note: str = "") -> Clause:
    """The clause for the difference of two columns, or for one column (`other` None), with the number of seeds that would decide it."""
    difference = [seed[:, [one]] if other is None else seed[:, [one]] - seed[:, [other]] for seed in seeds]
    found = records.estimate(difference)
    (value,) = intervals(found)
    if not np.isfinite(value.low):
        return measured(name, None, runs, note="no interval could be taken")
    of_name = measured(name, value, runs, note=note)
    if p_value(of_name) is None:
        return of_name
    effect = abs(of_name.threshold - of_name.boundary)
    # Where a clause's p value must lie if it is the smallest of all clauses of the rule, two-sided.
    strictest = 2 * FAMILY / len(rule_of(name))
    wanted = needs(value.value, found.draws[0], len(seeds), len(difference[0]), records.study.same_items, effect, strictest)
    if wanted.of == "units":
        return of_name._replace(note=f"{note}; {wanted} needed, whatever the seeds".removeprefix("; "))
    return of_name._replace(needs=wanted.number)


def clause_beside(records: Recorded, name: str, seeds: Sequence[np.ndarray], others: Sequence[np.ndarray] | None, runs: int, note: str) -> Clause:
    """The clause for the first column minus that of a control; without a control (`others` None) the note says what the study lacks."""
    if others is None:
        return measured(name, None, runs, note=note)
    return clause(records, name, [one[:, :1] - other[:, :1] for one, other in zip(seeds, others, strict=True)], 0, None, runs, note)


Change = Callable[[str], Sequence[np.ndarray]]  # of an arm: for each seed, units' contributions, the judged number in the first column


def beyond_shuffled(records: Recorded, name: str, arm: str, seeds: Sequence[np.ndarray], change: Change, runs: int) -> Clause:
    """The clause for an arm's change (`seeds`) minus that of the same tuning on shuffled answers."""
    twin = shuffled_twin(records.study, arm)
    if twin is None:
        return measured(name, None, runs, note="no arm is the same with shuffled: true")
    return clause_beside(records, name, seeds, change(twin), runs, f"minus {twin}")


def tuning_runs(records: Recorded, arm: str, frame: str) -> int:
    """How many models stand behind an arm: one that was tuned elsewhere (`path`), whatever the seeds; otherwise the number of seeds whose frames
    differ."""
    spec = records.study.arms[records.study.arm_settings[arm].arm]
    if isinstance(spec, Direct) and spec.path is not None and not records.study.worlds:
        return 1
    return len({each["value"].to_numpy(float).tobytes() for each in records(frame, arm)})


def verdict_table(row: Verdict, scales: Scales, header: Header) -> Table:
    """The verdict, its clauses, and what would have refuted them."""
    frame = pd.DataFrame([_clause_cells(place, one, scales) for place, one in enumerate(row.clauses, start=1)], dtype=str)
    places = {state: [str(place) for place, one in enumerate(row.clauses, start=1) if one.state == state] for state in STATES}
    found = "; ".join(f"{words}: {', '.join(places[state]) or 'none'}" for state, words in STATES.items())
    note = (
        f"{found}. 95 % intervals, {over(header.runs)}. p: of an effect that counts or a larger one, one-sided, corrected "
        f"by Holm for all clauses. A clause fails if p is at most {FAMILY:g}, so that a claim whose clauses are all true is refuted in at most 5 % "
        "of studies. It holds if it does not fail and its whole interval is in the range 'holds if all'. The claim is supported if every clause "
        "holds, not supported if any one fails, and otherwise underpowered. One seed describes this model and this run, and judges nothing. Needed: "
        "the number of seeds that would decide the clause four times in five, if the effect is the least that counts, or zero."
    )
    outcome = f": {row.verdict}" if row.verdict.startswith("cannot tell") else f" is {row.verdict}"
    return Table(f"Verdict, {row.arm}: '{row.claim}'{outcome}", frame, note)


def _clause_cells(place: int, one: Judged, scales: Scales) -> dict[str, str]:
    scale, digits, unit = scales[one.clause.partition("/")[0]]
    rule = ALL_CLAUSES[one.clause]
    boundary, threshold = (f"{number * scale:.{digits}f}" for number in (rule.boundary, one.threshold))
    return {
        "claimed": f"{place}. {one.claim}",
        "value": cell(one.value, scale, digits),
        "in": unit,
        "counts if": f"{rule.side} {threshold}",
        "p": "" if one.p is None else f"{one.p:.2g}",
        "holds if all": f"{rule.side} {boundary}",
        "state": one.state,
        "needed": "" if one.state != "cannot tell" else "n/a" if one.needs is None else str(Needs(one.needs, "seeds")),
        "note": one.note,
    }
