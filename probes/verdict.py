"""The rule, stated beforehand, for "direct tuning erodes what lower layers hold", and how measured intervals are judged by it.

Supported only if every clause of `RULE` holds (PROBES 7; after Jin et al. 2026, arXiv 2603.03415, on density, Ghorbani and Zou
2019, arXiv 1904.02868, on Shapley values of parts, and Zheng et al. 2025, arXiv 2501.13453, on spurious forgetting):
(a) in low layers the states of what is familiar lose density to those of what is not, and lose more than under random deltas
of the same norm and under tuning on shuffled answers; (b) restoring the low block brings back more knowledge than restoring
the high block, and more than restoring as large a change elsewhere (equal noise in every block of a random model harms most
where it enters first, so the former by itself says little); (c) a model tuned with its bottom half frozen keeps more
knowledge at the same task gain; (d) what was lost is not soon relearned.

What refutes it: any one clause failing. It fails when its 95 % interval excludes every effect in the claimed direction that
is large enough to count, be it because the effect is absent, reversed, or certain but too small. It holds when the interval
lies wholly on the claimed side. Anything else, a clause that was not measured among it, cannot tell: then the verdict is
"underpowered" and `needs` says how many seeds would decide. One tuning run describes and never judges: its intervals cover units only,
tuning again with another seed may give anything, and the verdict is "cannot tell: one seed". Chance: an effect that is just large enough fails a
clause once in forty times, so a true claim is refuted at most in 15 % of studies; a false one is supported in 2.5 % at most.

Not covered: knowledge that no read-out asks for, and a base that a proxy steers, whose layers cannot change by construction.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

State = Literal["holds", "fails", "cannot tell"]
Verdict = Literal["supported", "not supported", "underpowered", "cannot tell: one seed"]

# In effective rank: what separates hard from familiar questions in the source's own models of 1024 wide (.0021), a seventh of one vector's SD there.
SMALLEST_DENSITY = 0.002
# In probability of the right answer, or share right: one answer in a hundred; less would decide nobody's choice of an arm.
SMALLEST_KNOWLEDGE = 0.01
# Half of the steps: a fact that comes back in less than half the time of a new one was mostly still there.
MOST_SAVINGS = 0.5


class Clause(NamedTuple):
    """One interval and what is claimed of it.

    Claimed is that the value lies on one `side` of the `boundary`; `threshold` is the nearest value there that counts.
    `value`, `low` and `high` are None where it could not be measured; `runs` is how many tuning runs (seeds) the interval is over, and
    `needs` how many would be needed.
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
    """A clause of the `RULE` with (value, low, high) over `runs`; `interval` None, with a note why, where it could not be measured.

    `density`: effective rank, tuned less base, familiar less unfamiliar; with `/random` and `/shuffled`: the same less the null's.
    `restoration`: Shapley value of the low block less that of the high block; with `/elsewhere`: what the low block alone brings back
    less its control; and `freezing`: frozen less full; all in probability or share right. `savings`: S = 1 - steps to relearn /
    steps of what was never known. One unit gives a point and no interval: that is None, too. Raises KeyError for a name that is not in the rule.
    """
    value, low, high = interval or (None, None, None)
    note = "; ".join(part for part in (note, "one seed" if runs == 1 else "") if part)
    return RULE[name]._replace(value=value, low=low, high=high, runs=runs, needs=needs, note=note)


def state(clause: Clause) -> State:
    """Whether a clause holds, fails, or cannot be told, by its interval alone; an end that is NaN tells nothing, and neither does one run."""
    if clause.runs < 2 or clause.low is None or clause.high is None or math.isnan(clause.low + clause.high):
        return "cannot tell"
    sign = -1 if clause.side == "below" else 1
    least, most = sorted((sign * clause.low, sign * clause.high))
    if most < sign * clause.threshold:
        return "fails"
    return "holds" if least > sign * clause.boundary else "cannot tell"


def worst(states: Iterable[State]) -> State:
    """Of several intervals that are one claim: it fails if any fails and holds if all hold."""
    found = set(states)
    if "fails" in found:
        return "fails"
    return "holds" if found == {"holds"} else "cannot tell"


def verdict(clauses: Iterable[Clause]) -> Verdict:
    """Supported if every clause of the `RULE` holds, not supported if any fails, else underpowered; those not given cannot tell.

    Of one run there is no verdict, whatever the clauses.
    """
    judged = RULE | {clause.name: clause for clause in clauses}
    if any(clause.runs == 1 for clause in judged.values()):
        return "cannot tell: one seed"
    words: dict[State, Verdict] = {"holds": "supported", "fails": "not supported", "cannot tell": "underpowered"}
    return words[worst(state(clause) for clause in judged.values())]
