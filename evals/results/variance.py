"""Where the variance of a study's headline differences comes from, and what a study can tell before it runs.

The headline differences are those of each proxy (without proxies: of every other tuned arm) from the direct arm, in every measure with a role, and
in the gap that the arm closes. A study's mean is over families (worlds and their pretrained models, one a seed), tunings of each family, and the
persons (units) that are asked:

    y = mean + family + tuning in family + person in family + person at this tuning

The components are estimated by the moments of the analysis of variance (Searle, Casella and McCulloch 1992, Variance components, chapter 4): the
expected mean squares are solved for them, family by family, so that families may have other numbers of persons. Persons are units within their
levels of exposure, as in the intervals. What is estimated below zero is set to zero, and marked. With one tuning a family, family and tuning are
one part. Where all seeds have the same models and items (a user's data), seeds are tunings of one family.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import norm

from evals.display.cells import Table
from evals.measures.registry import measures
from evals.measures.shares import can_be_known
from evals.results.recorded import Recorded
from evals.statistics.estimates import levels
from evals.statistics.intervals import LEVEL
from evals.statistics.power import POWER, detectable
from evals.study import STUDIES, Study
from probes.knowledge.exposure import within_strata
from proxytune.errors import UserError

Row = dict[str, Any]
GAP = "gap closed"
SHIPPED = STUDIES / "variances.json"
PARTS = ("family", "tuning", "persons")
SHRINKS = {"family": "more families", "tuning": "more tunings a family", "persons": "more test persons a family"}


def components(families: Sequence[Float[np.ndarray, "tunings _"]]) -> dict[str, float | None]:
    """The parts of the variance of a mean over families and their tunings, from the units' contributions of every tuning.

    `family` and `tuning` are variances of one family's and one tuning's effect. `persons` is the variance of one family's mean (over its tunings)
    that its units cause. A part is None if it cannot be told: `tuning` with one tuning a family (it is then in `family`), `family` with one family,
    and any with one unit. Parts may be negative: they are unbiased.
    """
    tunings = len(families[0])
    persons = _mean([_persons(units) for units in families])
    tuning = _mean([_tuning(units) for units in families]) if tunings > 1 else None
    if len(families) == 1:
        return {"family": None, "tuning": tuning, "persons": persons}
    between = float(np.var([units.mean() for units in families], ddof=1))
    family = None if persons is None else between - persons - (0.0 if tuning is None else tuning / tunings)
    return {"family": family, "tuning": tuning, "persons": persons}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _persons(units: Float[np.ndarray, "tunings units"]) -> float | None:
    """The variance of the mean over units: of their means over tunings, since all tunings ask the same units."""
    count = units.shape[1]
    return float(units.mean(axis=0).var(ddof=1) / count) if count > 1 else None


def _tuning(units: Float[np.ndarray, "tunings units"]) -> float | None:
    """The variance of a tuning's effect: that of the tunings' means, without what units that differ from tuning to tuning add to it."""
    tunings, count = units.shape
    if count < 2:
        return None
    left = units - units.mean(axis=0) - units.mean(axis=1, keepdims=True) + units.mean()
    noise = (left**2).sum() / ((tunings - 1) * (count - 1))
    return float(units.mean(axis=1).var(ddof=1) - noise / count)


def variance(records: Recorded) -> list[Row]:
    """One row for each headline difference: `arm`, `minus`, `measure`, `value`, `gap` (true for the gap closed), `families`, `tunings`, `units` (mean
    per family), `parts` (see `components`, negative ones set to zero), `truncated` (the names of those) and `shares` of the variance of the study's
    mean (None for a part that cannot be told)."""
    study = records.study
    direct = study.direct_arm
    if direct is None:
        return []
    found = []
    for name in study.measures:
        if measures()[name].role is None or not records.has(name, direct):
            continue
        for arm in headline(study):
            units = _contributions(records, name, (arm, direct, study.base_arm))
            found.append(_row(arm, direct, name, False, [one[0] - one[1] for one in units], study.same_items))
            if measures()[name].role == "gain" and (closed := _closed(units)) is not None:
                found.append(_row(arm, direct, name, True, closed, study.same_items))
    return found


def headline(study: Study) -> list[str]:
    """The arms whose difference from the direct arm is the study's question: the proxies; without any, the other tuned arms."""
    kinds = {label: setting.kind for label, setting in study.arm_settings.items()}
    proxies = [label for label, kind in kinds.items() if kind == "proxy"]
    return proxies or [label for label, kind in kinds.items() if kind != "base" and label != study.direct_arm]


def _contributions(records: Recorded, name: str, arms: Sequence[str]) -> list[Float[np.ndarray, "arms tunings _"]]:
    """For every family: the units' contributions to each arm's share, in every tuning."""
    of_arms = [records.tunings(name, arm) for arm in arms]
    return [np.stack([[_units(frame) for frame in tunings] for tunings in of_family]) for of_family in zip(*of_arms, strict=True)]


def _units(frame: pd.DataFrame) -> Float[np.ndarray, " units"]:
    known = frame[can_be_known(frame)]
    means = known.groupby("unit", sort=True)["right"].mean().to_numpy(float)
    return within_strata(means[:, None], levels(known))[:, 0]


def _closed(units: Sequence[Float[np.ndarray, "arms tunings _"]]) -> list[Float[np.ndarray, "tunings _"]] | None:
    """Contributions to the gap closed, linear around the study's means (the delta method): arm minus base, less the gap closed times direct minus
    base, over the mean gap. None without a gap."""
    gains, gaps = ([one[place] - one[2] for one in units] for place in (0, 1))
    gain, gap = (float(np.mean([one.mean() for one in each])) for each in (gains, gaps))
    if gap == 0:
        return None
    return [gain / gap + (one - gain / gap * other) / gap for one, other in zip(gains, gaps, strict=True)]


def _row(arm: str, minus: str, measure: str, gap: bool, families: Sequence[Float[np.ndarray, "tunings _"]], same_items: bool) -> Row:
    value = float(np.mean([units.mean() for units in families]))
    if same_items:  # seeds are tunings of one family, on the same units
        families = [np.concatenate(list(families))]
    parts = components(families)
    kept = {name: None if part is None else max(0.0, part) for name, part in parts.items()}
    count, tunings = len(families), len(families[0])
    of_mean = {name: None if (part := kept[name]) is None else part / (count * (tunings if name == "tuning" else 1)) for name in PARTS}
    whole = sum(part for part in of_mean.values() if part is not None)
    return {
        "arm": arm,
        "minus": minus,
        "measure": measure,
        "gap": gap,
        "value": value,
        "families": count,
        "tunings": tunings,
        "units": float(np.mean([units.shape[1] for units in families])),
        "parts": kept,
        "truncated": [name for name, part in parts.items() if part is not None and part < 0],
        "shares": {name: None if part is None or not whole else part / whole for name, part in of_mean.items()},
    }


# What a study will be able to tell


def least(row: Row, families: int, tunings: int, same_items: bool) -> float | None:
    """The least true value of a row's difference that such a study finds in four of five cases, at 5 %; None if the row cannot say.

    By the t test over families, whose means vary by family, tunings and persons. One family: by its persons alone, so of this family. Where all
    seeds have the same items: by the t test over seeds, but no less than the items allow.
    """
    parts = row["parts"]
    if parts["persons"] is None or (parts["tuning"] if same_items else parts["family"]) is None:
        return None if parts["persons"] is None or families > 1 else _by_persons(parts["persons"])
    if families == 1:
        return _by_persons(parts["persons"])
    if same_items:
        return max(detectable(math.sqrt(parts["tuning"]), families), _by_persons(parts["persons"]))
    # With one tuning a family the tuning is in `family`, and cannot be divided by more of them.
    spread = parts["family"] + (parts["tuning"] or 0.0) / tunings + parts["persons"]
    return detectable(math.sqrt(spread), families)


def _by_persons(variance: float) -> float:
    return float((norm.ppf((1 + LEVEL) / 2) + norm.ppf(POWER)) * math.sqrt(variance))


def known_variances(study: Study, out: Path) -> tuple[list[Row], str]:
    """The variances that the least differences of a study are computed from, and where they are from: an earlier run in `out`, else those shipped for
    its worlds; none if there are neither. Raises `UserError` if the earlier results cannot be read."""
    pilot = out / "results.json"
    if pilot.exists():
        rows = _read(pilot)
        if rows.get("variance"):
            return list(rows["variance"]), f"an earlier run in this folder ({len(rows['seeds'])} seeds)"
    shipped = _read(SHIPPED) if SHIPPED.exists() else {}
    if len(study.worlds) == 1 and study.worlds[0] in shipped:
        of_world = shipped[study.worlds[0]]
        return list(of_world["variance"]), f"the study '{of_world['study']}' ({of_world['seeds']} seeds), shipped"
    return [], ""


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"out: '{path}' cannot be read as results of proxytune compare ({error}); move it away") from error
    return content if isinstance(content, dict) else {}


def excerpt(results: Path) -> dict[str, Any]:
    """The variances of a results.json of a study of one world, in the form of the shipped file."""
    content = _read(results)
    if len(content.get("worlds", ())) != 1 or not content.get("variance"):
        raise UserError(f"results: '{results}' holds no variances of one world; give the results.json of a study of one world with two seeds or more")
    return {content["worlds"][0]: {"study": content["study"], "seeds": len(content["seeds"]), "variance": content["variance"]}}


def power_table(study: Study, out: Path) -> Table:
    """What the study will be able to tell: the least difference that it finds in four of five cases, for every headline difference."""
    rows, source = known_variances(study, out)
    runs = len(study.seeds) * max(1, len(study.worlds))
    found = [(arm, name, gap, _matching(rows, arm, name, gap)) for arm, name, gap in _asked(study)]
    frame = pd.DataFrame(
        {
            "difference": [f"{arm} minus {study.direct_arm}" for arm, *_ in found],
            "measure": [f"{GAP}, {name}" if gap else name for _, name, gap, _ in found],
            "least difference found (points)": [_shown(row, study, runs) for *_, row in found],
            "by the variance of": ["" if row is None else f"{row['arm']} minus {row['minus']}" for *_, row in found],
        },
        dtype=str,
    )
    of_one = " With one seed: by its persons alone, so of this family only." if runs == 1 else ""
    note = f"Found in four of five studies of {runs} seed(s) at 5 %, two-sided.{of_one} Variances: {source or 'unknown; run two seeds first'}."
    return Table("What the study will be able to tell", frame, note)


def _shown(row: Row | None, study: Study, runs: int) -> str:
    found = None if row is None else least(row, runs, study.tuning_seeds, study.same_items)
    return "unknown: run two seeds first" if found is None else f"{100 * found:.1f}"


def _asked(study: Study) -> Iterator[tuple[str, str, bool]]:
    for name in study.measures if study.direct_arm is not None else ():
        role = measures()[name].role
        for arm in headline(study) if role is not None else ():
            yield arm, name, False
            if role == "gain":
                yield arm, name, True


def _matching(rows: Sequence[Row], arm: str, measure: str, gap: bool) -> Row | None:
    """The row of this arm; otherwise the one of its measure that varies most; None if there is none."""
    of_measure = [row for row in rows if (row["measure"], row["gap"]) == (measure, gap)]
    same = [row for row in of_measure if row["arm"] == arm]
    return max(same or of_measure, key=lambda row: sum(part or 0.0 for part in row["parts"].values()), default=None)


# What is shown


def variance_table(rows: Sequence[Row]) -> list[Table]:
    apart, families = bool(rows) and rows[0]["tunings"] > 1, rows[0]["families"] if rows else 0
    if not rows or (families == 1 and not apart):  # one run has one part
        return []
    names = _names(families, apart)
    frame = pd.DataFrame({"difference": [f"{row['arm']} minus {row['minus']}" for row in rows]})
    frame["measure"] = [f"{GAP}, {row['measure']}" if row["gap"] else row["measure"] for row in rows]
    frame["standard error (points)"] = [f"{100 * _error(row):.2f}" for row in rows]
    for name, title in names.items():
        frame[f"{title} (%)"] = [_percent(row, name) for row in rows]
    frame["shrinks most with"] = [_most(row, names) for row in rows]
    parts = "; ".join(f"{title}: shrinks with {_shrinks(name, apart, families)}" for name, title in names.items())
    both = "" if apart or families == 1 else " One tuning a family does not tell family and tuning seed apart; tuning_seeds: 2 in the study does."
    note = f"Shares of the variance of the study's mean. {parts}.{both} 0*: estimated below zero. With few families the shares are rough."
    return [Table("Variance", frame, note)]


def _names(families: int, apart: bool) -> Mapping[str, str]:
    """The parts that can be told, in words."""
    if families == 1:
        return {"tuning": "tuning seed", "persons": "persons or items"}
    if apart:
        return {"family": "world and pretraining", "tuning": "tuning seed", "persons": "persons"}
    return {"family": "world, pretraining and tuning seed", "persons": "persons"}


def _shrinks(name: str, apart: bool, families: int) -> str:
    if families == 1:
        return {"tuning": "more seeds", "persons": "more items"}[name]
    return "more families" if name == "family" else f"{SHRINKS[name]}, or more families"


def _most(row: Row, names: Mapping[str, str]) -> str:
    shares = {name: row["shares"][name] or 0.0 for name in names}
    largest = max(shares, key=shares.__getitem__)
    if row["families"] == 1:
        return _shrinks(largest, row["tunings"] > 1, 1) if shares[largest] else ""
    return SHRINKS[largest] if shares[largest] else ""


def _percent(row: Row, name: str) -> str:
    share = row["shares"][name]
    return "n/a" if share is None else f"{100 * share:.0f}" + ("*" if name in row["truncated"] else "")


def _error(row: Row) -> float:
    parts, tunings = row["parts"], row["tunings"]
    spread = (parts["family"] or 0.0) + (parts["tuning"] or 0.0) / tunings + (parts["persons"] or 0.0)
    return math.sqrt(spread / row["families"])
