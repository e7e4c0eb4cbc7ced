"""The verdict on "direct tuning erodes what lower layers hold", arm by arm: each clause of `probes/verdict.py` with its interval.

Controls are arms of the same study that differ from the judged one in one setting: `shuffled: true`, and `frozen: lower` chosen to match it
(`choose: ARM`). A clause whose control or measure the study lacks cannot be told, and neither can any of an arm that was tuned once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, t

from evals.findings import Found, change, intervals, means_by_unit, restoration_seeds, states_of
from evals.statistics import LEVEL, interval
from evals.study import Direct, Study
from finetune.recipe import Tuning
from probes.internals.blocks import thirds
from probes.knowledge.exposure import needed, needed_seeds
from probes.verdict import Clause, measured, state, verdict

CLAIM = "direct tuning erodes what lower layers hold"


def verdict_rows(found: Found, recoverability: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every tuned base that is no control itself: `arm`, `claim`, `verdict` and its `clauses`. Savings come from the rows of recoverability."""
    rows = []
    relearnt = {row["arm"]: row for row in recoverability}
    for arm in [arm for arm in found.arms("states") if arm != found.study.base_arm and not _is_control(found.study, arm)]:
        runs = tuning_runs(found, arm)
        clauses = [*_density(found, arm, runs), *_restoration(found, arm, runs), _freezing(found, arm, runs), _savings(relearnt.get(arm), runs)]
        shown = [
            {"clause": clause.name, "claim": clause.claim, "state": state(clause)}
            | {name: getattr(clause, name) for name in ("value", "low", "high", "threshold", "needs", "note")}
            for clause in clauses
        ]
        rows.append({"arm": arm, "claim": CLAIM, "verdict": verdict(clauses), "clauses": shown})
    return rows


def tuning_runs(found: Found, arm: str) -> int:
    """How many times the arm was tuned: once if elsewhere (`path`), whatever the seeds, else as often as its seeds differ in their states."""
    spec = found.study.arms[found.study.points[arm].arm]
    if isinstance(spec, Direct) and spec.path is not None:
        return 1
    return len({frame.select_dtypes(float).to_numpy().tobytes() for frame in found("states", arm)})


def _density(found: Found, arm: str, runs: int) -> list[Clause]:
    low = list(thirds(states_of(found("states", arm)[0]) - 1)["low"])
    seeds = change(found, arm, "residual", "last", low)
    clauses = [_clause(found, "density", seeds, 0, None, runs), _clause(found, "density/random", seeds, 0, 1, runs)]
    twin = _shuffled(found.study, arm)
    if twin is None:
        return [*clauses, measured("density/shuffled", None, runs, note="no arm is the same with shuffled: true")]
    beside = [np.stack([one[:, 0], other[:, 0]], axis=1) for one, other in zip(seeds, change(found, twin, "residual", "last", low), strict=True)]
    return [*clauses, _clause(found, "density/shuffled", beside, 0, 1, runs, note=f"less {twin}")]


def _restoration(found: Found, arm: str, runs: int) -> list[Clause]:
    if not found.has("restoration", arm):
        return [measured(name, None, runs, note="restoration was not measured") for name in ("restoration", "restoration/elsewhere")]
    names, seeds = restoration_seeds(found, arm)
    first = _clause(found, "restoration", seeds, names.index(("shapley", "low")), names.index(("shapley", "high")), runs)
    control = next((names.index((kind, "low")) for kind in ("same-norm", "same-number") if (kind, "low") in names), None)
    if control is None:
        return [first, measured("restoration/elsewhere", None, runs, note="more than half of the change is in the low block")]
    alone = names.index(("recovery", "low"))
    return [first, _clause(found, "restoration/elsewhere", seeds, alone, control, runs, note=f"less {names[control][0]}")]


def _freezing(found: Found, arm: str, runs: int) -> Clause:
    twin = _frozen(found.study, arm)
    if twin is None or not found.has("statement", arm):
        return measured(
            "freezing", None, runs, note="no arm has its lower half frozen and is chosen to match" if twin is None else "knowledge was not measured"
        )
    seeds = []
    for frame, other in zip(found("statement", twin), found("statement", arm), strict=True):
        exposed = (frame["popularity"] != 0).to_numpy()
        right = np.stack([frame["right"], other["right"]], axis=1).astype(float)[exposed]
        seeds.append(means_by_unit(frame[exposed], right))
    return _clause(found, "freezing", seeds, 0, 1, runs, note=f"{twin} less {arm}")


def _savings(row: dict[str, Any] | None, runs: int) -> Clause:
    if row is None:
        return measured("savings", None, runs, note="recoverability was not measured")
    saved = row["savings"]
    if saved is None or saved["low"] is None:
        return measured("savings", None, runs, note="nothing was lost beyond noise" if row["lost"]["low"] <= 0 else "not every curve could be read")
    return measured("savings", (saved["value"], saved["low"], saved["high"]), runs)


def _clause(found: Found, name: str, seeds: Sequence[np.ndarray], one: int, other: int | None, runs: int, note: str = "") -> Clause:
    """A difference of two columns, or one column by itself, and how many seeds would decide it."""
    difference = [seed[:, [one]] if other is None else seed[:, [one]] - seed[:, [other]] for seed in seeds]
    of = found.estimate(difference)
    (value,) = intervals(of)
    if not np.isfinite(value.low):
        return measured(name, None, runs, note="no interval could be taken")
    clause = measured(name, value, runs, note=note)
    if runs < 2 or state(clause) != "cannot tell":
        return clause
    effect, count = abs(clause.threshold - clause.boundary), len(difference[0])
    by_seeds, by_units = ((law.high - law.low) / 2 for law in (interval(value.value, draws) for draws in of.draws[0]))
    if not found.study.same_items:  # then every seed brings units of its own, and seeds differ at least by those
        by_seeds = max(by_seeds, by_units * t.ppf((1 + LEVEL) / 2, len(seeds) - 1) / norm.ppf((1 + LEVEL) / 2))
    elif (units := needed(by_units, count, effect)) > count:
        return clause._replace(note=f"{note}; {units} units needed, whatever the seeds".removeprefix("; "))
    return clause._replace(needs=needed_seeds(by_seeds, len(seeds), effect))


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
