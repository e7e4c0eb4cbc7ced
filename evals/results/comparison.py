"""The comparison across measures: the gap that an arm closes, differences between arms, and the frontier of task gain and knowledge kept.

Each measure declares whether it is a gain or what may be lost (`Measure.role`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evals.display.cells import Columns, Table, cell, table
from evals.display.chart import Axis, Chart, Panel, Series, all_scaled
from evals.measures.measure import Share
from evals.measures.registry import measures
from evals.measures.shares import DIFFERENCE, can_be_known
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.results.variance import variance, variance_table
from evals.selection import Choice, Choices
from evals.statistics.frontier import on_frontier
from evals.statistics.intervals import Estimate, gap_closed, interval
from evals.statistics.power import Needs, minimum_detectable_effect, needs
from evals.statistics.significance import mcnemar
from evals.statistics.value import Value, finite, value_in, value_of
from evals.study import Run, Study
from probes.significance import holm

Row = dict[str, Any]
PARTS = ("gap_closed", "against_direct", "contrasts", "frontier", "variance", "selections")
SHOWN = 6  # validation scores in a cell
FAR, LEAST_SPREAD = 5, 0.02  # so many spreads below the middle an arm is left out of a figure; the spread is a share
FEW = 4  # arms that a note names


def compare(records: Recorded, choices: Mapping[Run, Choices] | None = None) -> dict[str, list[Row]]:
    """The rows of `PARTS`. Each row names the arm and the measure; numbers are `value`, `low`, `high`.

    `gap_closed`: (arm - base) / (direct - base), uncapped and `capped` at 1; None where direct - base is within noise. `against_direct`: arm minus
    direct. Each of these rows names its reference in `direct`; those with the study's main reference come first. `contrasts`: the study's pairs,
    with McNemar's p, uncorrected and corrected for all contrasts of the measure, and the least difference that this number of items detects four
    times in five. `frontier`: each arm's gain and knowledge kept (arm minus base), whether no other arm is at least as good at both and better at
    one, and in what share of the intervals' draws this is so; the row `direct` is another arm's, and not among them. `variance`: where the variance
    of the headline differences comes from (`results/variance.py`). `selections`: what was selected for each arm, in which runs, with the
    candidates' validation scores.

    `needs` of a difference whose interval includes zero: the `number` of seeds or units (`of`) that would find a difference as large as the observed
    one four times in five (`statistics.power.needs`); None where it is decided. Gap closed has no such question of its own: an arm closes 100 %
    exactly where its difference from direct is zero. Its `needs` are those of the gap, direct minus base, where that is within noise.
    """
    study = records.study
    arms = list(study.arm_settings)
    found: dict[str, list[Row]] = {part: [] for part in PARTS} | {"selections": _selections(study, choices or {})}
    shares: dict[str, tuple[str, Estimate]] = {}
    for measure in (measures()[name] for name in study.measures if measures()[name].role is not None):
        for name, share in measure.shares(records).items():
            shares.setdefault(measure.role, (name, share.estimate))
            for direct in study.references:
                found["against_direct"] += _against_direct(study, arms, direct, name, share)
                if measure.role == "gain":
                    found["gap_closed"] += _gaps(study, arms, direct, name, share)
            found["contrasts"] += _contrasts(study, arms, name, share)
    for part in ("gap_closed", "against_direct"):
        found[part].sort(key=lambda row: study.references.index(row["direct"]))
    if {"gain", "kept"} <= set(shares):
        found["frontier"] = _frontier(study, shares["gain"], shares["kept"])
    found["variance"] = variance(records)
    return found


def _numbers(value: Value) -> Row:
    return {"value": value.value, "low": value.low, "high": value.high}


def _difference(estimate: Estimate, arm: int, other: int) -> Row:
    """The paired difference of two arms."""
    return _numbers(value_of(interval(estimate.value[arm] - estimate.value[other], estimate.draws[arm] - estimate.draws[other], DIFFERENCE)))


def _needs(study: Study, share: Share, arm: int, other: int) -> Row:
    """How many seeds or units would decide the difference of two arms; None where it is decided, or where nothing varies."""
    value = share.estimate.value[arm] - share.estimate.value[other]
    draws = share.estimate.draws[arm] - share.estimate.draws[other]
    found = interval(value, draws, DIFFERENCE)
    if found.excludes_zero() or found.low == found.high:
        return {"needs": None}
    units = share.frames[0][arm].loc[can_be_known, "unit"].nunique()
    return {"needs": needs(value, draws, len(share.frames), units, study.same_items, value)._asdict()}


def _against_direct(study: Study, arms: Sequence[str], direct: str, measure: str, share: Share) -> list[Row]:
    place = arms.index(direct)
    return [
        {"arm": arm, "direct": direct, "measure": measure} | _difference(share.estimate, position, place) | _needs(study, share, position, place)
        for position, arm in enumerate(arms)
        if position != place
    ]


def _contrasts(study: Study, arms: Sequence[str], measure: str, share: Share) -> list[Row]:
    """Tests assume independent items: they are left out if units have several items, or if there are several seeds."""
    pairs = [(arms.index(arm), arms.index(other)) for arm, other in study.contrasts]
    tests: list[Row] = [{"p": None, "p_holm": None, "detectable": None} for _ in pairs]
    frames = share.frames
    if pairs and len(frames) == 1 and frames[0][0]["unit"].is_unique:
        right = np.stack([frame[can_be_known(frame)]["right"].to_numpy() == 1 for frame in frames[0]])  # a tie is wrong
        first, second = (right[[pair[side] for pair in pairs]] for side in (0, 1))
        p = mcnemar(first, second)
        detectable = minimum_detectable_effect(right.shape[1], (first != second).mean(axis=1))
        tests = [
            {"p": float(one), "p_holm": float(corrected), "detectable": finite(least)}
            for one, corrected, least in zip(p, holm(p), detectable, strict=True)
        ]
    return [
        {"arm": arm, "minus": other, "measure": measure} | _difference(share.estimate, *places) | _needs(study, share, *places) | test
        for (arm, other), places, test in zip(study.contrasts, pairs, tests, strict=True)
    ]


def _gaps(study: Study, arms: Sequence[str], direct: str, measure: str, share: Share) -> list[Row]:
    base, place = arms.index(study.base_arm), arms.index(direct)
    rows, of_gap = [], _needs(study, share, place, base)
    for position, arm in enumerate(arms):
        if position not in (base, place):
            gap = gap_closed(share.estimate, position, base, place)
            closed = Value(None) if gap is None else value_of(gap)
            capped = None if closed.value is None else min(closed.value, 1.0)
            rows.append({"arm": arm, "direct": direct, "measure": measure} | _numbers(closed) | {"capped": capped} | of_gap)
    return rows


def _frontier(study: Study, gains: tuple[str, Estimate], kepts: tuple[str, Estimate]) -> list[Row]:
    (gain_measure, gain), (kept_measure, kept) = gains, kepts
    own = len(study.rows)  # without the row `direct`, which is the last
    now, draws = on_frontier(gain.value[:own], kept.value[:own]), on_frontier(gain.draws[:own], kept.draws[:own])
    base = list(study.rows).index(study.base_arm)
    return [
        {"arm": label, "family": setting.family, "setting": setting.value, "on_frontier": bool(now[position])}
        | {"share_of_draws": _share_of_draws(draws[position], bool(now[position]))}
        | {
            "gain": {"measure": gain_measure} | _difference(gain, position, base),
            "kept": {"measure": kept_measure} | _difference(kept, position, base),
        }
        for position, (label, setting) in enumerate(study.rows.items())
    ]


def _selections(study: Study, choices: Mapping[Run, Choices]) -> list[Row]:
    """One row for each arm that selects and each run; one for each arm if its setting was selected beforehand, on families of `seeds`."""
    selected = study.selected
    runs = [(run.world, run.seed, chosen) for run, chosen in choices.items()]
    if selected is None:
        return [_selection(choice, [] if world is None else [world], [seed]) for world, seed, chosen in runs for choice in chosen.values()]
    return [_selection(choice, list(selected.worlds), list(selected.seeds)) | {"beforehand": True} for choice in runs[0][2].values()] if runs else []


def _selection(choice: Choice, worlds: list[str], seeds: list[int]) -> Row:
    return {"arm": choice.arm, "chosen": choice.label, "worlds": worlds, "seeds": seeds, "beforehand": False, "scores": dict(choice.scores)}


def _share_of_draws(draws: np.ndarray, now: bool) -> float:
    """The share from the distribution that agrees less with the observed value, as an interval is the wider of both."""
    shares = draws.mean(axis=-1)
    return float(shares.min() if now else shares.max())


# What is shown

TO_DECIDE = "how many seeds or units would find a difference as large as this one four times in five"


def _in_words(row: Row, form: str = "{}") -> str:
    """What would decide an open row; empty if it is decided."""
    return "" if row["needs"] is None else form.format(Needs(**row["needs"]))


def with_comparison(shown: Table, measure: str, compared: dict[str, list[Row]]) -> Table:
    """A measure's table by arm, with columns for the gap closed and the difference from the direct arm."""
    columns: Columns = {}
    against = [row for row in compared["against_direct"] if row["measure"] == measure]
    references = list(dict.fromkeys(row["direct"] for row in against))
    for direct in references:
        gaps = [row for row in compared["gap_closed"] if (row["measure"], row["direct"]) == (measure, direct)]
        if gaps:
            name = "gap closed" if len(references) == 1 else f"gap closed (vs {direct})"
            columns[name] = {row["arm"]: cell(value_in(row), 100) + _in_words(row, " ({})") for row in gaps}
        if gaps and len(references) == 1:
            columns["capped"] = {row["arm"]: "" if row["capped"] is None else f"{row['capped'] * 100:.1f}" for row in gaps}
        differences = [row for row in against if row["direct"] == direct]
        columns[f"Δ vs {direct}"] = {row["arm"]: cell(value_in(row), 100) for row in differences}
        if direct == references[0] and any(row["needs"] for row in differences):
            columns["to decide Δ"] = {row["arm"]: _in_words(row) for row in differences}
    arms = shown.frame.iloc[:, 0]
    frame = shown.frame.assign(**{name: [cells.get(arm, "") for arm in arms] for name, cells in columns.items()})
    closed = any(row["measure"] == measure for row in compared["gap_closed"])
    note = " Gap closed = (arm - base) / (direct - base); n/a where direct - base is within noise." if closed else ""
    note += f" To decide Δ: {TO_DECIDE}." if "to decide Δ" in columns else ""
    return Table(shown.title, frame, f"{shown.note}{note}")


def with_comparisons(tables: list[Table], measure: str, compared: dict[str, list[Row]]) -> list[Table]:
    """A measure's tables, the first ones with the comparison of its shares, in their order."""
    shares = list(dict.fromkeys(row["measure"] for row in compared["against_direct"] if row["measure"].partition("/")[0] == measure))
    return [with_comparison(table, share, compared) for table, share in zip(tables, shares, strict=False)] + tables[len(shares) :]


def comparison_tables(compared: dict[str, list[Row]]) -> list[Table]:
    tables = [*_frontier_table(compared["frontier"]), *_contrast_table(compared["contrasts"]), *_selection_table(compared["selections"])]
    return [*tables, *variance_table(compared["variance"])]


def comparison_charts(compared: dict[str, list[Row]], header: Header) -> Iterator[Chart]:
    """The frontier, in full and near its right end: a line through the settings of every arm, and a dotted step line through the frontier."""
    rows = compared["frontier"]
    if not rows:
        return
    best = sorted((100 * row["gain"]["value"], 100 * row["kept"]["value"]) for row in rows if row["on_frontier"])
    step = Series("step", tuple(Value(y) for _, y in best), tuple(x for x, _ in best))
    far = _far_below(rows)
    panels = []
    for near in (False, True):
        shown = rows if near else [row for row in rows if row not in far]
        lines = [_family(near, [row for row in shown if row["family"] == family]) for family in dict.fromkeys(row["family"] for row in shown)]
        x, y = (Axis(f"{rows[0][name]['measure']}, arm minus base (points)") for name in ("gain", "kept"))
        title = "filled: on the frontier"
        if near:
            right, lowest = best[-1][0], min(y for x, y in best if x >= 0.75 * best[-1][0])
            x = Axis(x.label, limits=(0.75 * right, right + 0.06 * abs(right) + 1))
            y = Axis(y.label, limits=(lowest - 3, max(y for _, y in best) + 2))
            title = "the frontier's right end, with paired 95 % intervals"
        panels.append(Panel((step, *lines), title, x, y, zero=True))
    title = f"{header.title}: {rows[0]['gain']['measure']} against {rows[0]['kept']['measure']}"
    yield Chart("frontier", title, tuple(panels), _left_out(far), paired=True, across=2)


def _far_below(rows: Sequence[Row]) -> list[Row]:
    """Arms that lose far more than the others, such as an expert by itself: they would squeeze these into a corner of the figure."""
    kept = np.array([row["kept"]["value"] for row in rows])
    middle = np.median(kept)
    spread = max(LEAST_SPREAD, np.abs(kept[kept >= np.quantile(kept, 0.25)] - middle).max())
    return [row for row, value in zip(rows, kept, strict=True) if value < middle - FAR * spread]


def _left_out(far: Sequence[Row]) -> str:
    """A note of at most four arms."""
    names = [f"{row['arm']} ({100 * row['kept']['value']:.0f})" for row in far[:FEW]]
    more = f", and {len(far) - FEW} more" if len(far) > FEW else ""
    return f"far below, and not drawn: {', '.join(names)}{more}" if far else ""


def _family(intervals: bool, rows: Sequence[Row]) -> Series:
    ordered = sorted(rows, key=lambda row: row["setting"] or 0)
    values = {name: all_scaled([value_in(row[name]) for row in ordered], 100) for name in ("gain", "kept")}
    if not intervals:
        values = {name: tuple(Value(value.value) for value in of_name) for name, of_name in values.items()}
    filled = tuple(row["on_frontier"] for row in ordered)
    return Series("line", values["kept"], across=values["gain"], label=ordered[0]["family"], filled=filled)


def _frontier_table(rows: Sequence[Row]) -> list[Table]:
    if not rows:
        return []
    frame = pd.DataFrame({"arm": [row["arm"] for row in rows]})
    for name in ("gain", "kept"):
        frame[f"{rows[0][name]['measure']}, arm minus base"] = [cell(value_in(row[name]), 100) for row in rows]
    frame["on the frontier"] = ["yes" if row["on_frontier"] else "" for row in rows]
    frame["in % of draws"] = [f"{row['share_of_draws'] * 100:.0f}" for row in rows]
    families = dict.fromkeys(row["family"] for row in rows if row["on_frontier"])
    note = "In percentage points. On the frontier: no other arm is at least as good at both and better at one. "
    return [Table("Frontier", frame, f"{note}Arms with a setting on it: {', '.join(families)}. Draws: those of the intervals.")]


def _contrast_table(rows: Sequence[Row]) -> list[Table]:
    if not rows:
        return []
    names = [f"{row['arm']} minus {row['minus']}" for row in rows]
    frame = pd.DataFrame({"arms": list(dict.fromkeys(names))})
    for measure in dict.fromkeys(row["measure"] for row in rows):
        of_measure = {name: row for name, row in zip(names, rows, strict=True) if row["measure"] == measure}
        frame[measure] = [cell(value_in(of_measure[name]), 100) for name in frame["arms"]]
        if any(row["needs"] for row in of_measure.values()):
            frame[f"to decide, {measure}"] = [_in_words(of_measure[name]) for name in frame["arms"]]
        tests = [row for row in of_measure.values() if row["p"] is not None]
        if tests:
            frame[f"p, {measure}"] = [f"{row['p']:.2g} ({row['p_holm']:.2g})" for row in tests]
            frame[f"detectable, {measure}"] = ["" if row["detectable"] is None else f"{row['detectable'] * 100:.1f}" for row in tests]
    note = "Paired differences in percentage points, 95 % intervals; p by McNemar's exact test (in parentheses: Holm's correction for all contrasts)"
    note += "; detectable: the least difference that this number of items detects four times in five"
    return [Table("Contrasts", frame, f"{note}; to decide: {TO_DECIDE}.")]


def _selection_table(rows: Sequence[Row]) -> list[Table]:
    """What was selected for each arm, in how many runs, and the best candidates' mean scores."""
    columns: Columns = {"selected": {}, "validation scores": {}}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        of_arm = [row for row in rows if row["arm"] == arm]
        counts = Counter(row["chosen"] for row in of_arm)
        times = [f"{label} ({count} of {len(of_arm)})" if len(of_arm) > 1 else label for label, count in counts.most_common()]
        means = {label: float(np.mean([row["scores"][label] for row in of_arm])) for label in of_arm[0]["scores"]}
        best = sorted(means, key=means.__getitem__, reverse=True)
        more = f", and {len(best) - SHOWN} lower" if len(best) > SHOWN else ""
        columns["selected"][arm] = ", ".join(times)
        columns["validation scores"][arm] = ", ".join(f"{label} {means[label] * 100:.1f}" for label in best[:SHOWN]) + more
    if rows and rows[0]["beforehand"]:
        worlds, seeds = (", ".join(map(str, rows[0][part])) for part in ("worlds", "seeds"))
        where = f"beforehand, on families of {worlds} with the seeds {seeds}, which are in no table"
        costs = "Scores are means over these families. The trials are not among the costs."
    else:
        where = "in every run by itself, on items that are held out of the trials' tuning"
        costs = "Scores are means over the runs. The trials are among the costs."
    note = f"Settings were selected {where}; test items were not used. Per cent right. {costs}"
    return table("Selected on validation items", columns["selected"], columns, note)
