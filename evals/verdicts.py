"""The verdict on "direct tuning erodes what lower layers hold", arm by arm: each clause of `probes/verdict.py` with its interval.

Controls are arms of the same study that differ from the judged one in one setting: `shuffled: true`, and `frozen: lower` chosen to match it
(`choose: ARM`). A clause whose control or measure the study lacks cannot be told.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.findings import Found, change, intervals, means_by_unit, restoration_seeds, states_of
from evals.statistics import Estimate
from evals.study import Direct, Study
from finetune.recipe import Tuning
from probes.blocks import thirds
from probes.exposure import needed, needed_seeds
from probes.verdict import SMALLEST_DENSITY, SMALLEST_KNOWLEDGE, Clause, measured, state, verdict

CLAIM = "direct tuning erodes what lower layers hold"


def verdict_rows(found: Found, recoverability: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every tuned base that is no control itself: `arm`, `claim`, `verdict` and its `clauses`. Savings come from the rows of recoverability."""
    rows = []
    relearnt = {row["arm"]: row for row in recoverability}
    for arm in [arm for arm in found.arms("states") if arm != found.study.base_arm and not _is_control(found.study, arm)]:
        clauses = [*_density(found, arm), *_restoration(found, arm), _freezing(found, arm), _savings(relearnt.get(arm))]
        shown = [
            {"clause": clause.name, "claim": clause.claim, "state": state(clause)}
            | {name: getattr(clause, name) for name in ("value", "low", "high", "threshold", "needs", "note")}
            for clause in clauses
        ]
        rows.append({"arm": arm, "claim": CLAIM, "verdict": verdict(clauses), "clauses": shown})
    return rows


def _density(found: Found, arm: str) -> list[Clause]:
    low = list(thirds(states_of(found("states", arm)[0]) - 1)["low"])
    seeds = change(found, arm, "residual", "last", low)
    both = found.estimate(seeds)
    clauses = [_clause("density", both, 0, None, seeds, SMALLEST_DENSITY), _clause("density/random", both, 0, 1, seeds, SMALLEST_DENSITY)]
    twin = _shuffled(found.study, arm)
    if twin is None:
        return [*clauses, measured("density/shuffled", None, note="no arm is the same with shuffled: true")]
    beside = [np.stack([one[:, 0], other[:, 0]], axis=1) for one, other in zip(seeds, change(found, twin, "residual", "last", low), strict=True)]
    return [*clauses, _clause("density/shuffled", found.estimate(beside), 0, 1, beside, SMALLEST_DENSITY, note=f"less {twin}")]


def _restoration(found: Found, arm: str) -> list[Clause]:
    if not found.has("restoration", arm):
        return [measured(name, None, note="restoration was not measured") for name in ("restoration", "restoration/elsewhere")]
    names, seeds = restoration_seeds(found, arm)
    of = found.estimate(seeds)
    first = _clause("restoration", of, names.index(("shapley", "low")), names.index(("shapley", "high")), seeds, SMALLEST_KNOWLEDGE)
    control = next((names.index((kind, "low")) for kind in ("same-norm", "same-number") if (kind, "low") in names), None)
    if control is None:
        return [first, measured("restoration/elsewhere", None, note="more than half of the change is in the low block")]
    alone = names.index(("recovery", "low"))
    return [first, _clause("restoration/elsewhere", of, alone, control, seeds, SMALLEST_KNOWLEDGE, note=f"less {names[control][0]}")]


def _freezing(found: Found, arm: str) -> Clause:
    twin = _frozen(found.study, arm)
    if twin is None or not found.has("statement", arm):
        return measured(
            "freezing", None, note="no arm has its lower half frozen and is chosen to match" if twin is None else "knowledge was not measured"
        )
    seeds = []
    for frame, other in zip(found("statement", twin), found("statement", arm), strict=True):
        exposed = (frame["popularity"] != 0).to_numpy()
        right = np.stack([frame["right"], other["right"]], axis=1).astype(float)[exposed]
        seeds.append(means_by_unit(frame[exposed], right))
    return _clause("freezing", found.estimate(seeds), 0, 1, seeds, SMALLEST_KNOWLEDGE, note=f"{twin} less {arm}")


def _savings(row: dict[str, Any] | None) -> Clause:
    if row is None:
        return measured("savings", None, note="recoverability was not measured")
    saved = row["savings"]
    if saved is None or saved["low"] is None:
        return measured("savings", None, note="nothing was lost beyond noise" if row["lost"]["low"] <= 0 else "not every curve could be read")
    return measured("savings", (saved["value"], saved["low"], saved["high"]))


def _clause(name: str, of: Estimate, one: int, other: int | None, seeds: Sequence[np.ndarray], smallest: float, note: str = "") -> Clause:
    """A difference of two series, or one series by itself, and how much more data would decide it."""
    value, draws = (of.value[one], of.draws[one]) if other is None else (of.value[one] - of.value[other], of.draws[one] - of.draws[other])
    (found,) = intervals(Estimate(np.array([value]), draws[None]))
    if not np.isfinite(found.low):
        return measured(name, None, note="no interval could be taken")
    half = (found.high - found.low) / 2
    effect = max(smallest, abs(found.value))
    several = len(seeds) > 1
    needs = needed_seeds(half, len(seeds), effect) if several else needed(half, len(seeds[0]), effect)
    clause = measured(name, (found.value, found.low, found.high), needs, note)
    return clause if state(clause) == "cannot tell" else clause._replace(needs=None)


def _tuning(study: Study, label: str) -> tuple[Direct, Tuning | None]:
    point = study.points[label]
    arm = study.arms[point.arm]
    assert isinstance(arm, Direct)
    return arm, arm.tuning if arm.choose is not None else arm.points(point.arm)[label][1]


def _is_control(study: Study, label: str) -> bool:
    _, tuning = _tuning(study, label)
    return tuning is not None and (tuning.shuffled or tuning.frozen is not None)


def _shuffled(study: Study, label: str) -> str | None:
    """The point tuned just so on shuffled answers."""
    _, tuning = _tuning(study, label)
    wanted = None if tuning is None else tuning.model_copy(update={"shuffled": True})
    return next((other for other in study.direct_points if wanted is not None and _tuning(study, other)[1] == wanted), None)


def _frozen(study: Study, label: str) -> str | None:
    """The point with the lower half frozen whose dial was chosen to match this one's task score."""
    for other in study.direct_points:
        arm, tuning = _tuning(study, other)
        if arm.choose == label and tuning is not None and tuning.frozen == "lower":
            return other
    return None
