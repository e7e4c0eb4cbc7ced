"""The rules, fixed beforehand, for four claims, and how intervals are judged by them.

A claim is supported only if every clause of its rule holds. For erosion (`RULE`), after Jin et al. 2026 (arXiv 2603.03415) on density, Ghorbani and
Zou 2019 (arXiv 1904.02868) on Shapley values of parts, and Zheng et al. 2025 (arXiv 2501.13453) on spurious forgetting, these are: (a) in low
layers familiar states lose density relative to unfamiliar ones, and lose more than under random deltas of the same norm and under tuning on
shuffled answers; (b) restoring the low block brings back more knowledge than restoring the high block, and more than restoring an equally large
change elsewhere (equal noise in every block of a random model does most harm where it enters first, so the first part alone says little); (c) a
model tuned with its bottom half frozen keeps more knowledge at the same task gain; (d) lost knowledge is not relearned quickly; (e) at names, low
layers tell familiar from unfamiliar ones less well by their density, and that less well than under tuning on shuffled answers (added after the
other seven had been judged once, before any study was judged by it).

For exposure (`EXPOSURE_RULE`), at one site, with the sign that was predicted for it: (a) the names that were stated most often are told from those
never stated, (b) density follows exposure over all levels, and (c) they are told better than by a model without the exposure: an untrained one,
or one that was taught other names. For "direct tuning erodes density at names" (`NAMES_RULE`), at a site and layers where the base shows it: the
AUROC of familiar against unfamiliar names comes nearer to .5, and nearer than under tuning on shuffled answers. Layers are fixed beforehand
(`LAYERS_OF_EXPOSURE`). The shipped study `exposure` had been read once when this rule was written, by the rule that stands in its file; the study
`taught` had not.

For "KL to the base decides what is forgotten" (`LAW_RULE`), on the task's prompts (Shenfeld et al. 2025, arXiv 2509.04259) or on statements: (a) arms
that are farther from the base lost more; (b) one curve explains half of what arms lost or more; (c) and (d) steered arms lie on the curve of the
tuned ones, neither above nor below it by what counts.

The claim is refuted if any clause fails. A clause fails when the hypothesis that its effect is large enough to count (as large as `threshold`, in
the claimed direction) is rejected: the effect is absent, reversed, or too small. Its one-sided p value (`p_value`) is that of a t test with the
degrees of freedom of the runs, whose standard error is read from the 95 % interval. That is exact where the interval is the t interval over runs,
and cautious where units make it wider. The p values of all measured clauses are corrected by Holm, so that a claim that is true in every clause,
however barely, is refuted in at most 5 % of studies (`FAMILY`), whatever the dependence between clauses. Seven 95 % intervals without correction
would refute it in up to 16 %. A clause holds when it does not fail and its whole interval is on the claimed side. Support needs all clauses, so it
needs no correction: a false claim is supported in at most 2.5 % of studies. Otherwise, and where a clause was not measured, it cannot tell: then
the verdict is "underpowered" and `needs` says how many seeds would decide. One tuning run is described but not judged: its intervals cover units
only, and another seed may give any other result; the verdict is then "cannot tell: one seed".

Power that is left, by simulation: a claim whose effects are all twice the least that counts except one, which is zero, where seeds differ by a
standard deviation of half the least that counts, is refuted in 17 % of studies with 3 seeds (without correction: 47 %) and in 97 % with 8 (100 %).
Where they differ by all of it: in 6 % (18 %) and 42 % (68 %). So three seeds seldom refute.

Not covered: knowledge that no read-out asks for, and a base that a proxy steers, whose layers cannot change.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from probes.significance import holm

State = Literal["holds", "fails", "cannot tell"]
Verdict = Literal["supported", "not supported", "underpowered", "cannot tell: one seed"]

# In effective rank: the difference of hard and familiar questions in the source's models of width 1024 (.0021), a seventh of one vector's SD.
SMALLEST_DENSITY = 0.002
# In probability of the right answer, or share right: one answer in a hundred; a smaller effect does not matter for the choice of an arm.
SMALLEST_KNOWLEDGE = 0.01
# In AUROC (.5 is nothing): of names that were stated most often against those never stated, and of what tuning changes.
SMALLEST_SEPARATION, SMALLEST_SEPARATION_CHANGE = 0.1, 0.02
# A rank correlation.
SMALLEST_TREND = 0.1
# The third of the layers at which exposure is judged, by site: where pilots saw it (in worlds of four layers the last one).
LAYERS_OF_EXPOSURE = {"residual": "middle", "neurons": "high"}
# Half of the steps: a fact that returns in less than half the steps of a new one was mostly kept.
MOST_SAVINGS = 0.5
# Of a correlation and of a variance explained: half.
SMALLEST_SHARE = 0.5
# The largest share of studies in which a claim is refuted although every clause of it is true.
FAMILY = 0.05
# The interval's share of the distribution on each side.
TAIL = 0.025


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
        Clause("names", "in low layers neurons tell familiar from unfamiliar names less well", "below", 0.0, -SMALLEST_SEPARATION_CHANGE),
        Clause("names/shuffled", "less well than under tuning on shuffled answers", "below", 0.0, -SMALLEST_SEPARATION_CHANGE),
    )
}
EXPOSURE_RULE: dict[str, Clause] = {
    clause.name: clause
    for clause in (
        Clause("dose", "the most exposed names are told from names never stated", "above", 0.0, SMALLEST_SEPARATION),
        Clause("trend", "density follows exposure over all levels", "above", 0.0, SMALLEST_TREND),
        Clause("dose/beside", "they are told better than in a model without the exposure", "above", 0.0, SMALLEST_SEPARATION),
    )
}
NAMES_RULE: dict[str, Clause] = {
    clause.name: clause
    for clause in (
        Clause("seen", "familiar names are told from unfamiliar ones less well than by the base", "below", 0.0, -SMALLEST_SEPARATION_CHANGE),
        Clause("seen/shuffled", "less well than after tuning on shuffled answers", "below", 0.0, -SMALLEST_SEPARATION_CHANGE),
    )
}
LAW_RULE: dict[str, Clause] = {
    clause.name: clause
    for clause in (
        Clause("follows", "arms farther from the base lost more (rank correlation)", "above", SMALLEST_SHARE, SMALLEST_SHARE),
        Clause("explained", "one curve explains half of what arms lost, or more (R²)", "above", SMALLEST_SHARE, SMALLEST_SHARE),
        Clause("steered/more", "steered arms lost no more than tuned ones at the same KL", "below", SMALLEST_KNOWLEDGE, SMALLEST_KNOWLEDGE),
        Clause("steered/less", "steered arms lost no less than tuned ones at the same KL", "above", -SMALLEST_KNOWLEDGE, -SMALLEST_KNOWLEDGE),
    )
}
ALL_CLAUSES = RULE | EXPOSURE_RULE | NAMES_RULE | LAW_RULE


def rule_of(name: str) -> Mapping[str, Clause]:
    """The rule that has the clause of this name."""
    return next(rule for rule in (RULE, EXPOSURE_RULE, NAMES_RULE, LAW_RULE) if name in rule)


def measured(name: str, interval: tuple[float, float, float] | None, runs: int, needs: int | None = None, note: str = "") -> Clause:
    """A clause of a rule with (value, low, high) over `runs`. `interval` is None, with a note why, where it could not be measured.

    `density`: effective rank, tuned minus base, familiar minus unfamiliar; with `/random` and `/shuffled`: minus that of the null.
    `restoration`: Shapley value of the low block minus that of the high block; with `/elsewhere`: the recovery of the low block minus
    its control; `freezing`: frozen minus full; all in probability or share right. `savings`: S = 1 - steps to relearn / steps to learn
    something new. `names`, `dose` and `trend`: see `evals/measures/dose.py`; in AUROC from .5, or rank correlation, times the sign. A single
    unit gives a value without an interval: this is None, too. Raises KeyError for an unknown name.
    """
    value, low, high = interval or (None, None, None)
    note = "; ".join(part for part in (note, "one seed" if runs == 1 else "") if part)
    return ALL_CLAUSES[name]._replace(value=value, low=low, high=high, runs=runs, needs=needs, note=note)


def p_value(clause: Clause) -> float | None:
    """One-sided p of the hypothesis that the effect is as large as the `threshold`, in the claimed direction, or larger.

    None where nothing was measured, where an end is NaN or infinite, or with one run. The standard error is the distance from the value to the
    interval's end that is nearer to the threshold, over the t quantile with `runs` - 1 degrees of freedom. An interval without width gives 0 or 1.
    """
    if clause.runs < 2 or clause.value is None or clause.low is None or clause.high is None or not math.isfinite(clause.low + clause.high):
        return None
    distance = clause.threshold - clause.value
    width = clause.high - clause.value if distance > 0 else clause.value - clause.low
    sign = -1 if clause.side == "below" else 1
    if width <= 0:
        return 0.0 if sign * distance > 0 else 1.0
    degrees = clause.runs - 1
    return float(stdtr(degrees, sign * distance / width * stdtrit(degrees, TAIL)))


def p_values(clauses: Sequence[Clause]) -> list[float | None]:
    """The p value of each clause, corrected by Holm for all that were measured."""
    found = [p_value(clause) for clause in clauses]
    corrected = iter(holm(np.array([p for p in found if p is not None])).tolist())
    return [None if p is None else next(corrected) for p in found]


def states(clauses: Sequence[Clause]) -> list[State]:
    """Whether each clause of one claim holds, fails or cannot tell, from all intervals together: those of clauses that are left out do not count.

    A clause with an end that is NaN, or with a single run, cannot tell.
    """
    return [_state(clause, p) for clause, p in zip(clauses, p_values(clauses), strict=True)]


def _state(clause: Clause, p: float | None) -> State:
    if p is None or clause.low is None or clause.high is None:
        return "cannot tell"
    if p <= FAMILY:
        return "fails"
    claimed = clause.high < clause.boundary if clause.side == "below" else clause.low > clause.boundary
    return "holds" if claimed else "cannot tell"


def worst(states: Iterable[State]) -> State:
    """The state of one claim with several intervals: it fails if any fails, and holds if all hold."""
    found = set(states)
    if "fails" in found:
        return "fails"
    return "holds" if found == {"holds"} else "cannot tell"


def verdict(clauses: Iterable[Clause], rule: Mapping[str, Clause] = RULE) -> Verdict:
    """Supported if every clause of the `rule` holds, not supported if any fails, else underpowered. Clauses that are not given cannot tell.

    One run never gives a verdict.
    """
    judged = dict(rule) | {clause.name: clause for clause in clauses}
    if any(clause.runs == 1 for clause in judged.values()):
        return "cannot tell: one seed"
    words: dict[State, Verdict] = {"holds": "supported", "fails": "not supported", "cannot tell": "underpowered"}
    return words[worst(states(list(judged.values())))]
