"""The rule, fixed beforehand, for the claim "direct tuning erodes what lower layers hold", and how intervals are judged by it.

The claim is supported only if every clause of `RULE` holds (after Jin et al. 2026, arXiv 2603.03415, on density, Ghorbani and Zou
2019, arXiv 1904.02868, on Shapley values of parts, and Zheng et al. 2025, arXiv 2501.13453, on spurious forgetting):
(a) in low layers familiar states lose density relative to unfamiliar ones, and lose more than under random deltas of the same
norm and under tuning on shuffled answers; (b) restoring the low block brings back more knowledge than restoring the high block,
and more than restoring an equally large change elsewhere (equal noise in every block of a random model does most harm where it
enters first, so the first part alone says little); (c) a model tuned with its bottom half frozen keeps more knowledge at the
same task gain; (d) lost knowledge is not relearned quickly.

The claim is refuted if any clause fails. A clause fails when its 95 % interval excludes every effect in the claimed direction that
is large enough to count: the effect is absent, reversed, or too small. It holds when the whole interval is on the claimed side.
Otherwise, and where a clause was not measured, it cannot tell: then the verdict is "underpowered" and `needs` says how many seeds
would decide. One tuning run is described but not judged: its intervals cover units only, and another seed may give any other
result; the verdict is then "cannot tell: one seed". Error rates: an effect that is just large enough fails a clause in 2.5 % of
studies, so a true claim is refuted in at most 15 % of studies; a false claim is supported in at most 2.5 %.

Not covered: knowledge that no read-out asks for, and a base that a proxy steers, whose layers cannot change.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

State = Literal["holds", "fails", "cannot tell"]
Verdict = Literal["supported", "not supported", "underpowered", "cannot tell: one seed"]

# In effective rank: the difference of hard and familiar questions in the source's models of width 1024 (.0021), a seventh of one vector's SD.
SMALLEST_DENSITY = 0.002
# In probability of the right answer, or share right: one answer in a hundred; a smaller effect does not matter for the choice of an arm.
SMALLEST_KNOWLEDGE = 0.01
# Half of the steps: a fact that returns in less than half the steps of a new one was mostly kept.
MOST_SAVINGS = 0.5


class Clause(NamedTuple):
    """One interval and the claim about it.

    The claim is that the value is on one `side` of the `boundary`; `threshold` is the smallest effect there that counts. `value`, `low`
    and `high` are None where it could not be measured. `runs` is the number of tuning runs (seeds) behind the interval, `needs` the
    number that would decide.
    """

    name: str
    claim: str
    side: Literal["below", "above"]
    boundary: float
    threshold: float
    value: float | None = None
    low: float | None = None
    high: float | None = None
    runs: int = 0
    needs: int | None = None
    note: str = ""


RULE: dict[str, Clause] = {
    clause.name: clause
    for clause in (
        Clause("density", "familiar states in low layers lose density, unfamiliar ones less", "below", 0.0, -SMALLEST_DENSITY),
        Clause("density/random", "they lose more than under random deltas of the same norm", "below", 0.0, -SMALLEST_DENSITY),
        Clause("density/shuffled", "they lose more than under tuning on shuffled answers", "below", 0.0, -SMALLEST_DENSITY),
        Clause("restoration", "restoring the low block brings back more than restoring the high block", "above", 0.0, SMALLEST_KNOWLEDGE),
        Clause("restoration/elsewhere", "it brings back more than as large a change restored elsewhere", "above", 0.0, SMALLEST_KNOWLEDGE),
        Clause("freezing", "freezing the bottom half keeps more knowledge at the same task gain", "above", 0.0, SMALLEST_KNOWLEDGE),
        Clause("savings", "relearning saves less than half of the steps", "below", MOST_SAVINGS, MOST_SAVINGS),
    )
}


def measured(name: str, interval: tuple[float, float, float] | None, runs: int, needs: int | None = None, note: str = "") -> Clause:
    """A clause of the `RULE` with (value, low, high) over `runs`. `interval` is None, with a note why, where it could not be measured.

    `density`: effective rank, tuned minus base, familiar minus unfamiliar; with `/random` and `/shuffled`: minus that of the null.
    `restoration`: Shapley value of the low block minus that of the high block; with `/elsewhere`: the recovery of the low block minus
    its control; `freezing`: frozen minus full; all in probability or share right. `savings`: S = 1 - steps to relearn / steps to learn
    something new. A single unit gives a value without an interval: this is None, too. Raises KeyError for an unknown name.
    """
    value, low, high = interval or (None, None, None)
    note = "; ".join(part for part in (note, "one seed" if runs == 1 else "") if part)
    return RULE[name]._replace(value=value, low=low, high=high, runs=runs, needs=needs, note=note)


def state(clause: Clause) -> State:
    """Whether a clause holds, fails or cannot tell, from its interval alone; with an end that is NaN or with a single run it cannot tell."""
    if clause.runs < 2 or clause.low is None or clause.high is None or math.isnan(clause.low + clause.high):
        return "cannot tell"
    sign = -1 if clause.side == "below" else 1
    least, most = sorted((sign * clause.low, sign * clause.high))
    if most < sign * clause.threshold:
        return "fails"
    return "holds" if least > sign * clause.boundary else "cannot tell"


def worst(states: Iterable[State]) -> State:
    """The state of one claim with several intervals: it fails if any fails, and holds if all hold."""
    found = set(states)
    if "fails" in found:
        return "fails"
    return "holds" if found == {"holds"} else "cannot tell"


def verdict(clauses: Iterable[Clause]) -> Verdict:
    """Supported if every clause of the `RULE` holds, not supported if any fails, else underpowered. Clauses that are not given cannot tell.

    One run never gives a verdict.
    """
    judged = RULE | {clause.name: clause for clause in clauses}
    if any(clause.runs == 1 for clause in judged.values()):
        return "cannot tell: one seed"
    words: dict[State, Verdict] = {"holds": "supported", "fails": "not supported", "cannot tell": "underpowered"}
    return words[worst(state(clause) for clause in judged.values())]
