"""From records to numbers: every value with its interval, as the one object that tables, figures and JSON show."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evals.costs import COUNTED, MEASURED
from evals.frontier import on_frontier
from evals.metrics import holm, mcnemar, minimum_detectable_effect
from evals.records import Record
from evals.statistics import Estimate, Interval, bootstrap_means, gap_closed, interval
from evals.study import Study
from probes.density import erosion_verdict, thirds
from probes.forgetting import Familiarity, familiarity
from proxytune.errors import UserError

DENSITY_METRIC = "effective_rank"
SHARE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)  # what shares and their differences can be
READOUTS = {"statement": "forgetting", "question": "forgetting/question", "choice": "forgetting/choice"}
Select = Callable[[pd.DataFrame], "np.ndarray[Any, np.dtype[np.bool_]]"]


def summarize(study: Study, records: Sequence[Record]) -> dict[str, Any]:
    """The results: `study`, `seeds`, `base` (the base's arm), `rows`, `gap_closed`, `against_direct`, `contrasts`, `frontier`,
    `costs`, `density_of_base`, `verdicts`.

    A row is arm, measure, value, low, high, n (items over all seeds), unparsed and, where the value needs a word, note.
    Shares are between 0 and 1; forgetting is the base's share less the arm's; density is the change of (familiar less
    unfamiliar) in effective rank; `density_of_base` is that contrast itself, in the base and in an untrained model of its
    shape, with the sd of one vector of the Gaussian null. `frontier` has each point's task gain and knowledge kept (arm less base, paired),
    whether it lies on their frontier, and in what share of the intervals' draws; `costs` are means over seeds of what can be counted: the
    same in every run. What a machine measured is in `measured_costs`. Raises `UserError` where records of one measurement were asked differently.
    """
    _check_protocols(records)
    arms = list(study.points)
    results: dict[str, Any] = {"study": study.study, "seeds": list(study.seeds), "base": study.base_arm}
    results |= {part: [] for part in ("rows", "gap_closed", "against_direct", "contrasts", "frontier", "costs", "density_of_base", "verdicts")}
    if "task" in study.measures:
        estimate = _share_rows(results, records, arms, "task", "task")
        _direct_rows(results, study, arms, "task", estimate)
        _contrast_rows(results, study, arms, "task", estimate, frames_of(records, "task", arms))
        _gap_rows(results, study, arms, estimate)
    if "knowledge" in study.measures:
        known = _share_rows(results, records, arms, "statement", "knowledge")
        _direct_rows(results, study, arms, "knowledge", known)
        _contrast_rows(results, study, arms, "knowledge", known, frames_of(records, "statement", arms))
        if "task" in study.measures:
            _frontier_rows(results, study, estimate, known)
    if "forgetting" in study.measures:
        for measurement, measure in READOUTS.items():
            _forgetting_rows(results, study, records, arms, measurement, measure)
    if "density" in study.measures:
        _density_rows(results, study, records)
    results["costs"] = _mean_costs(study, records, (*COUNTED, "runs", "flops_a_token", "bytes_a_token"))
    return results


def measured_costs(study: Study, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Means over seeds of what the machine measured while each arm was tuned: seconds, peak_memory (bytes), energy (joules)."""
    return _mean_costs(study, records, MEASURED)


def _mean_costs(study: Study, records: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for arm in study.points:
        of_seeds = {record.seed: record.cost for record in records if record.arm == arm}.values()
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


def estimate_means(frames: Sequence[Sequence[pd.DataFrame]], column: str, select: Select, stream: int = 0) -> Estimate:
    """Shares of the selected items' units, one series an arm."""
    return bootstrap_means([np.stack([_unit_means(frame[select(frame)], column) for frame in seed]) for seed in frames], stream, shares=True)


def _unit_means(frame: pd.DataFrame, column: str) -> np.ndarray:
    return frame.groupby("unit", sort=True)[column].mean().to_numpy(float)


def _exposed(frame: pd.DataFrame) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Items that could be known: all but those stated zero times."""
    return (frame["popularity"] != 0).to_numpy()


def _row(arm: str, measure: str, value: Interval, frames: Sequence[pd.DataFrame], select: Select) -> dict[str, Any]:
    chosen = [frame[select(frame)] for frame in frames]
    unparsed = int(sum(frame["unparsed"].sum() for frame in chosen)) if all("unparsed" in frame for frame in chosen) else 0
    return {"arm": arm, "measure": measure} | _numbers(value) | {"n": sum(map(len, chosen)), "unparsed": unparsed}


def _numbers(value: Interval) -> dict[str, float]:
    return {name: round(number, 6) + 0.0 for name, number in value._asdict().items()}


def _share_rows(results: dict[str, Any], records: Sequence[Record], arms: Sequence[str], measurement: str, measure: str) -> Estimate:
    frames = frames_of(records, measurement, arms)
    estimate = estimate_means(frames, "right", _exposed)
    for position, arm in enumerate(arms):
        value = interval(estimate.value[position], estimate.draws[position], SHARE)
        results["rows"].append(_row(arm, measure, value, [seed[position] for seed in frames], _exposed))
    return estimate


def _less(estimate: Estimate, arm: int, other: int) -> dict[str, float]:
    """The paired difference of two arms."""
    return _numbers(interval(estimate.value[arm] - estimate.value[other], estimate.draws[arm] - estimate.draws[other], DIFFERENCE))


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
        right = np.stack([frame[_exposed(frame)]["right"].to_numpy(bool) for frame in frames[0]])
        first, second = (right[[pair[side] for pair in pairs]] for side in (0, 1))
        p = mcnemar(first, second)
        detectable = minimum_detectable_effect(right.shape[1], (first != second).mean(axis=1))
        numbers = zip(p, holm(p), detectable, strict=True)
        tests = [{"p": round(float(one), 6), "p_holm": round(float(all_), 6), "detectable": _finite(least)} for one, all_, least in numbers]
    for (arm, other), (position, place), test in zip(study.contrasts, pairs, tests, strict=True):
        results["contrasts"].append({"arm": arm, "less": other, "measure": measure} | _less(estimate, position, place) | test)


def _finite(number: float) -> float | None:
    return round(float(number), 6) if np.isfinite(number) else None


def _gap_rows(results: dict[str, Any], study: Study, arms: Sequence[str], estimate: Estimate) -> None:
    if study.direct_arm is None:
        return
    base, direct = arms.index(study.base_arm), arms.index(study.direct_arm)
    for position, arm in enumerate(arms):
        if position in (base, direct):
            continue
        gap = gap_closed(estimate, position, base, direct)
        if gap is None:
            numbers: dict[str, float | None] = {"value": None, "low": None, "high": None, "capped": None}
        else:
            numbers = {**_numbers(gap), "capped": round(min(gap.value, 1.0), 6)}
        results["gap_closed"].append({"arm": arm, "measure": "task"} | numbers)


def _frontier_rows(results: dict[str, Any], study: Study, task: Estimate, known: Estimate) -> None:
    now, draws = on_frontier(task.value, known.value), on_frontier(task.draws, known.draws)
    base = list(study.points).index(study.base_arm)
    for position, (label, point) in enumerate(study.points.items()):
        results["frontier"].append(
            {"arm": label, "family": point.arm, "dial": point.value, "on_frontier": bool(now[position])}
            | {"share_of_draws": round(float(draws[position].mean()), 4)}
            | {"gain": _less(task, position, base), "kept": _less(known, position, base)}
        )


def _forgetting_rows(results: dict[str, Any], study: Study, records: Sequence[Record], arms: Sequence[str], measurement: str, measure: str) -> None:
    frames = frames_of(records, measurement, arms)
    if not frames:
        return
    base = arms.index(study.base_arm)
    for label in _familiarity(frames[0][base]).labels:
        select = in_bucket(label)
        estimate = estimate_means(frames, "right", select)
        for position, arm in enumerate(arms):
            if position != base:
                value = interval(estimate.value[base] - estimate.value[position], estimate.draws[base] - estimate.draws[position], DIFFERENCE)
                results["rows"].append(_row(arm, f"{measure}/{label}", value, [seed[position] for seed in frames], select))


def _density_rows(results: dict[str, Any], study: Study, records: Sequence[Record]) -> None:
    """Changes against the base in the lower and upper third, and their difference, in the neurons' basis and rotated."""
    direct = study.direct_points
    frames = frames_of(records, "density", [study.base_arm, *direct])
    blocks = thirds(states_of(frames[0][0]))
    for position, arm in enumerate(direct, start=1):
        changes = {}
        for view in ("pre", "rotated"):
            for block, states in blocks.items():
                changes[block, view] = density_change(frames, position, [f"{DENSITY_METRIC}/{view}/{state}" for state in states])
        lower, upper = changes["lower", "pre"], changes["upper", "pre"]
        values = {
            "density/lower": _only(lower),
            "density/upper": _only(upper),
            "density/lower-upper": interval(lower.value[0] - upper.value[0], lower.draws[0] - upper.draws[0]),
            "density/lower/rotated": _only(changes["lower", "rotated"]),
            "density/upper/rotated": _only(changes["upper", "rotated"]),
        }
        for measure, value in values.items():
            results["rows"].append(_row(arm, measure, value, [seed[position] for seed in frames], _contrasted))
        verdict = erosion_verdict(values["density/lower"], values["density/lower-upper"])
        results["verdicts"].append({"arm": arm, "claim": "tuning erodes familiar density in lower layers", "verdict": verdict})
    for state in range(states_of(frames[0][0])):
        trained, untrained = (_numbers(_only(_density_contrast(frames, f"{DENSITY_METRIC}/{view}/{state}"))) for view in ("pre", "untrained"))
        one_vector = float(np.mean([seed[0][f"{DENSITY_METRIC}/gaussian_sd/{state}"].iloc[0] for seed in frames]))
        results["density_of_base"].append({"state": state, "base": trained, "untrained": untrained, "gaussian_sd": round(one_vector, 6)})
    for arm in list(study.points):
        # An expert by itself is another model: its states have nothing to be subtracted from.
        if arm not in direct and study.points[arm].kind != "expert":
            for measure in ("density/lower", "density/upper", "density/lower-upper"):
                zero = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0, "unparsed": 0}
                results["rows"].append({"arm": arm, "measure": measure} | zero | {"note": "unchanged by construction"})


def density_change(frames: Sequence[Sequence[pd.DataFrame]], arm: int, columns: list[str]) -> Estimate:
    """(arm - base) of the familiar less (arm - base) of the unfamiliar, averaged over the columns; `frames[seed][0]` is the base."""
    return _contrast([(seed[0], (seed[arm][columns] - seed[0][columns]).mean(axis=1)) for seed in frames])


def _density_contrast(frames: Sequence[Sequence[pd.DataFrame]], column: str) -> Estimate:
    """The base's familiar less its unfamiliar: whether density tells them apart at all, before any tuning."""
    return _contrast([(seed[0], seed[0][column]) for seed in frames])


def _contrast(seeds: Sequence[tuple[pd.DataFrame, pd.Series]]) -> Estimate:
    """Of values that belong to a frame's items: the mean over familiar units less that over unfamiliar ones."""
    means = []
    for stream, sign in enumerate((1, -1)):
        chosen = [np.array(_familiarity(frame).contrast) == sign for frame, _ in seeds]
        values = [frame.assign(value=value)[these] for (frame, value), these in zip(seeds, chosen, strict=True)]
        means.append(bootstrap_means([_unit_means(frame, "value")[None] for frame in values], stream))
    familiar, unfamiliar = means
    return Estimate(familiar.value - unfamiliar.value, familiar.draws - unfamiliar.draws)


def states_of(frame: pd.DataFrame) -> int:
    """How many states (layers and embeddings) a density record holds."""
    return sum(column.startswith(f"{DENSITY_METRIC}/pre/") for column in frame.columns)


def _only(estimate: Estimate) -> Interval:
    return interval(estimate.value[0], estimate.draws[0])


def _familiarity(frame: pd.DataFrame) -> Familiarity:
    return familiarity(frame["popularity"].tolist())


def in_bucket(label: str) -> Select:
    return lambda frame: np.array(_familiarity(frame).buckets) == label


def _contrasted(frame: pd.DataFrame) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    return np.array(_familiarity(frame).contrast) != 0
