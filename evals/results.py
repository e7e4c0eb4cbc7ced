"""From records to numbers: every value with its interval, as the one object that tables, figures and JSON show."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evals.costs import COUNTED, MEASURED
from evals.findings import (
    Found,
    drift_rows,
    erosion_rows,
    exposure_rows,
    finite,
    law_rows,
    lens_rows,
    levels,
    null_rows,
    numbers,
    patching_rows,
    rankme_rows,
    recoverability_rows,
    restoration_rows,
)
from evals.frontier import on_frontier
from evals.metrics import holm, mcnemar, minimum_detectable_effect
from evals.records import Record
from evals.statistics import Estimate, Interval, bootstrap_means, gap_closed, interval
from evals.study import Study
from evals.verdicts import verdict_rows
from probes.knowledge.familiarity import Familiarity, familiarity
from proxytune.errors import UserError

SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)  # what shares and their differences can be
WEIGHED = {"density", "restoration", "recoverability"}  # without all of these there is no verdict
READOUTS = {"statement": "forgetting", "question": "forgetting/question", "choice": "forgetting/choice"}
Select = Callable[[pd.DataFrame], "np.ndarray[Any, np.dtype[np.bool_]]"]


def summarize(study: Study, records: Sequence[Record]) -> dict[str, Any]:
    """The results: `study`, `seeds`, `base` (the base's arm), `kinds` of points, `rows`, `gap_closed`, `against_direct`, `contrasts`, `frontier`,
    `costs`, and what was found inside: `exposure`, `nulls`, `rankme`, `erosion`, `law`, `drift`, `lens`, `restoration`, `patching`,
    `recoverability` (see `findings`) and `verdicts`.

    A row is arm, measure, value, low, high, n (items over all seeds), unparsed, where choices were made tied (items of which several
    choices had the highest score: each counts 1/k) and, where the value needs a word, note.
    Shares are between 0 and 1; forgetting is the base's share less the arm's. `frontier` has each point's task gain and knowledge
    kept (arm less base, paired), whether it lies on their frontier, and in what share of the intervals' draws; `costs` are means
    over seeds of what can be counted: the same in every run. What a machine measured is in `measured_costs`. Raises `UserError`
    where records of one measurement were asked differently.
    """
    _check_protocols(records)
    arms = list(study.points)
    results: dict[str, Any] = {"study": study.study, "seeds": list(study.seeds), "base": study.base_arm}
    results["kinds"] = {label: point.kind for label, point in study.points.items()}
    results |= {part: [] for part in ("rows", "gap_closed", "against_direct", "contrasts", "frontier", "costs")}
    if "task" in study.measures:
        estimate = _share_rows(results, study, records, arms, "task", "task")
        _direct_rows(results, study, arms, "task", estimate)
        _contrast_rows(results, study, arms, "task", estimate, frames_of(records, "task", arms))
        _gap_rows(results, study, arms, estimate)
    if "knowledge" in study.measures:
        known = _share_rows(results, study, records, arms, "statement", "knowledge")
        _direct_rows(results, study, arms, "knowledge", known)
        _contrast_rows(results, study, arms, "knowledge", known, frames_of(records, "statement", arms))
        if "task" in study.measures:
            _frontier_rows(results, study, estimate, known)
    if "forgetting" in study.measures:
        for measurement, measure in READOUTS.items():
            _forgetting_rows(results, study, records, arms, measurement, measure)
    found = Found(study, records)
    relearnt = recoverability_rows(found)
    results |= {
        "exposure": exposure_rows(found) if "density" in study.measures else [],
        "nulls": null_rows(found) if "density" in study.measures else [],
        "rankme": rankme_rows(found) if "density" in study.measures else [],
        "erosion": erosion_rows(found) if "density" in study.measures else [],
        "law": law_rows(found),
        "drift": drift_rows(found) if "drift" in study.measures else [],
        "lens": lens_rows(found),
        "restoration": restoration_rows(found),
        "patching": patching_rows(found),
        "recoverability": relearnt,
        "verdicts": verdict_rows(found, relearnt) if set(study.measures) >= WEIGHED else [],
    }
    results["costs"] = _mean_costs(study, records, (*COUNTED, "runs", "flops_a_token", "bytes_a_token"))
    return results


def measured_costs(study: Study, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Means over seeds of what the machine measured while each arm was tuned: seconds, peak_memory (bytes), energy (joules)."""
    return _mean_costs(study, records, MEASURED)


def _mean_costs(study: Study, records: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for arm in study.points:
        of_seeds = {record.seed: record.cost for record in records if record.arm == arm and record.cost}.values()
        if not of_seeds:  # only its inside was looked at
            continue
        known = {name: [cost[name] for cost in of_seeds] for name in names}
        rows.append({"arm": arm} | {name: None if None in values else round(float(np.mean(values)), 3) for name, values in known.items()})
    return rows


def _check_protocols(records: Sequence[Record]) -> None:
    seen: dict[tuple[str, int], Record] = {}
    for record in records:
        first = seen.setdefault((record.measurement, record.seed), record)
        if record.protocol != first.protocol:
            raise UserError(f"{record.measurement}: arms {first.arm} and {record.arm} were asked differently; rows of one table need one protocol")


def frames_of(records: Sequence[Record], measurement: str, arms: Sequence[str]) -> list[list[pd.DataFrame]]:
    """For every seed, the items of every arm."""
    found = {(record.seed, record.arm): record.items for record in records if record.measurement == measurement}
    seeds = dict.fromkeys(seed for seed, _ in found)
    return [[found[seed, arm] for arm in arms] for seed in seeds]


def estimate_means(frames: Sequence[Sequence[pd.DataFrame]], column: str, select: Select, *, same_items: bool) -> Estimate:
    """Shares of the selected items' units, one series an arm. `same_items`: see `Study.same_items`."""
    seeds = [np.stack([_unit_means(frame[select(frame)], column) for frame in seed]) for seed in frames]
    strata = [levels(seed[0][select(seed[0])]) for seed in frames]
    return bootstrap_means(seeds, shares=True, strata=strata, same_units=same_items)


def _unit_means(frame: pd.DataFrame, column: str) -> np.ndarray:
    return frame.groupby("unit", sort=True)[column].mean().to_numpy(float)


def _exposed(frame: pd.DataFrame) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Items that could be known: all but those stated zero times."""
    return (frame["popularity"] != 0).to_numpy()


def _row(arm: str, measure: str, value: Interval, frames: Sequence[pd.DataFrame], select: Select) -> dict[str, Any]:
    chosen = [frame[select(frame)] for frame in frames]
    unparsed = int(sum(frame["unparsed"].sum() for frame in chosen)) if all("unparsed" in frame for frame in chosen) else 0
    tied = {"tied": int(sum(frame["tied"].sum() for frame in chosen))} if all("tied" in frame for frame in chosen) else {}
    return {"arm": arm, "measure": measure} | numbers(value) | {"n": sum(map(len, chosen)), "unparsed": unparsed} | tied


def _share_rows(results: dict[str, Any], study: Study, records: Sequence[Record], arms: Sequence[str], measurement: str, measure: str) -> Estimate:
    frames = frames_of(records, measurement, arms)
    estimate = estimate_means(frames, "right", _exposed, same_items=study.same_items)
    for position, arm in enumerate(arms):
        value = interval(estimate.value[position], estimate.draws[position], SHARE)
        results["rows"].append(_row(arm, measure, value, [seed[position] for seed in frames], _exposed))
    return estimate


def _less(estimate: Estimate, arm: int, other: int) -> dict[str, float | None]:
    """The paired difference of two arms."""
    return numbers(interval(estimate.value[arm] - estimate.value[other], estimate.draws[arm] - estimate.draws[other], DIFFERENCE))


def _direct_rows(results: dict[str, Any], study: Study, arms: Sequence[str], measure: str, estimate: Estimate) -> None:
    if study.direct_arm is None:
        return
    direct = arms.index(study.direct_arm)
    for position, arm in enumerate(arms):
        if position != direct:
            results["against_direct"].append({"arm": arm, "direct": study.direct_arm, "measure": measure} | _less(estimate, position, direct))


def _contrast_rows(
    results: dict[str, Any], study: Study, arms: Sequence[str], measure: str, estimate: Estimate, frames: Sequence[Sequence[pd.DataFrame]]
) -> None:
    """Each wanted difference with McNemar's p, by itself and corrected for all contrasts of the measure, and the least difference
    that as many items find four times in five. Tests take items as independent: there are none for units of several or many seeds."""
    pairs = [(arms.index(arm), arms.index(other)) for arm, other in study.contrasts]
    tests: list[dict[str, float | None]] = [{"p": None, "p_holm": None, "detectable": None} for _ in pairs]
    if pairs and len(frames) == 1 and frames[0][0]["unit"].is_unique:
        right = np.stack([frame[_exposed(frame)]["right"].to_numpy() == 1 for frame in frames[0]])  # a tie is wrong
        first, second = (right[[pair[side] for pair in pairs]] for side in (0, 1))
        p = mcnemar(first, second)
        detectable = minimum_detectable_effect(right.shape[1], (first != second).mean(axis=1))
        tested = zip(p, holm(p), detectable, strict=True)
        tests = [{"p": round(float(one), 6), "p_holm": round(float(all_), 6), "detectable": finite(least)} for one, all_, least in tested]
    for (arm, other), (position, place), test in zip(study.contrasts, pairs, tests, strict=True):
        results["contrasts"].append({"arm": arm, "less": other, "measure": measure} | _less(estimate, position, place) | test)


def _gap_rows(results: dict[str, Any], study: Study, arms: Sequence[str], estimate: Estimate) -> None:
    if study.direct_arm is None:
        return
    base, direct = arms.index(study.base_arm), arms.index(study.direct_arm)
    for position, arm in enumerate(arms):
        if position in (base, direct):
            continue
        gap = gap_closed(estimate, position, base, direct)
        if gap is None:
            closed: dict[str, float | None] = {"value": None, "low": None, "high": None, "capped": None}
        else:
            closed = {**numbers(gap), "capped": round(min(gap.value, 1.0), 6)}
        results["gap_closed"].append({"arm": arm, "measure": "task"} | closed)


def _frontier_rows(results: dict[str, Any], study: Study, task: Estimate, known: Estimate) -> None:
    now, draws = on_frontier(task.value, known.value), on_frontier(task.draws, known.draws)
    base = list(study.points).index(study.base_arm)
    for position, (label, point) in enumerate(study.points.items()):
        results["frontier"].append(
            {"arm": label, "family": point.arm, "dial": point.value, "on_frontier": bool(now[position])}
            | {"share_of_draws": round(_share_of_draws(draws[position], bool(now[position])), 4)}
            | {"gain": _less(task, position, base), "kept": _less(known, position, base)}
        )


def _share_of_draws(draws: np.ndarray, now: bool) -> float:
    """By the law that agrees less with what was seen, as an interval is the wider of both."""
    shares = draws.mean(axis=-1)
    return float(shares.min() if now else shares.max())


def _forgetting_rows(results: dict[str, Any], study: Study, records: Sequence[Record], arms: Sequence[str], measurement: str, measure: str) -> None:
    frames = frames_of(records, measurement, arms)
    if not frames:
        return
    base = arms.index(study.base_arm)
    for label in _familiarity(frames[0][base]).labels:
        select = in_bucket(label)
        estimate = estimate_means(frames, "right", select, same_items=study.same_items)
        for position, arm in enumerate(arms):
            if position != base:
                value = interval(estimate.value[base] - estimate.value[position], estimate.draws[base] - estimate.draws[position], DIFFERENCE)
                results["rows"].append(_row(arm, f"{measure}/{label}", value, [seed[position] for seed in frames], select))


def _familiarity(frame: pd.DataFrame) -> Familiarity:
    return familiarity(frame["popularity"].tolist())


def in_bucket(label: str) -> Select:
    return lambda frame: np.array(_familiarity(frame).buckets) == label
