"""From the records of what tuning did inside to numbers with intervals: exposure slopes, erosion, drift, lens, restoration, recoverability.

A row names what it is of, then value, low, high. Differences between arms are paired over units; familiar and unfamiliar are compared
within strata of one length and last token where there are such (`matched` counts the items), else as they are.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from evals.records import Record
from evals.statistics import Estimate, Interval, bootstrap_means, interval
from evals.study import Study
from finetune.items import Item
from probes.density import METRICS, SITES
from probes.internals.blocks import BLOCKS, thirds
from probes.knowledge.candidates import Known
from probes.knowledge.exposure import matched, matched_contrast, rank_correlation, strata, unit_means, within_strata
from probes.knowledge.familiarity import FEW_LEVELS, familiarity
from probes.recoverability import FORGOTTEN, Curve, Savings, savings, spurious
from probes.restoration import block_label, damage, recovery, shapley
from proxytune.errors import UserError

METRIC = "effective_rank"
WHOLLY_SHOWN = ("e5", METRIC)  # at every site and place; other metrics in the residual stream at the last token
COLUMNS_AT_ONCE = 100
RESAMPLES = 300  # of units, for how soon knowledge returns: each runs through a whole curve
Row = dict[str, Any]


class Found:
    """The records' frames by measurement and arm, one a seed."""

    def __init__(self, study: Study, records: Sequence[Record]):
        self.study = study
        self.estimate = partial(estimate, same_units=study.same_items)
        self._frames: dict[tuple[str, str], list[pd.DataFrame]] = {}
        for record in records:
            self._frames.setdefault((record.measurement, record.arm), []).append(record.items)

    def __call__(self, measurement: str, arm: str) -> list[pd.DataFrame]:
        return self._frames.get((measurement, arm), [])

    def has(self, measurement: str, arm: str) -> bool:
        return (measurement, arm) in self._frames

    def arms(self, measurement: str) -> list[str]:
        return [arm for arm in self.study.points if self.has(measurement, arm)]


def numbers(value: Interval) -> dict[str, float | None]:
    """A value and its interval's ends for JSON."""
    return {name: finite(number) for name, number in value._asdict().items()}


def finite(number: float) -> float | None:
    """Rounded for JSON; None for what is not a number."""
    return round(float(number), 6) + 0.0 if np.isfinite(number) else None


def estimate(seeds: Sequence[np.ndarray], same_units: bool = False) -> Estimate:
    """Of contributions [units, columns] of every seed; columns without a number in some seed have none. A hundred columns at a time."""
    columns = seeds[0].shape[1]
    whole = np.all([np.isfinite(seed).all(axis=0) for seed in seeds], axis=0)
    parts = [
        bootstrap_means([np.nan_to_num(seed[:, start : start + COLUMNS_AT_ONCE]).T for seed in seeds], same_units=same_units)
        for start in range(0, columns, COLUMNS_AT_ONCE)
    ]
    value, draws = np.concatenate([part.value for part in parts]), np.concatenate([part.draws for part in parts])
    return Estimate(np.where(whole, value, np.nan), np.where(whole.reshape(-1, *[1] * (draws.ndim - 1)), draws, np.nan))


def intervals(found: Estimate, bounds: tuple[float, float] = (-np.inf, np.inf)) -> list[Interval]:
    """Of every column, cut to what it can be (`bounds`)."""
    return [interval(value, draws, bounds) if np.isfinite(value) else Interval(np.nan, np.nan, np.nan) for value, draws in zip(*found, strict=True)]


def by_unit(frame: pd.DataFrame, values: np.ndarray) -> np.ndarray:
    """Items' values [items, columns] as units'."""
    return unit_means(values, frame["unit"].tolist())


def levels(frame: pd.DataFrame) -> np.ndarray:
    """The stratum of every unit (sorted by name): its level of exposure where there are few, each of several units. Then how many units have it
    was decided and not drawn. All are one stratum where popularity is as it came."""
    of_units = frame.groupby("unit", sort=True)["popularity"].mean().to_numpy(float)
    _, places, counts = np.unique(of_units, return_inverse=True, return_counts=True)
    return places if len(counts) <= FEW_LEVELS and counts.min() > 1 else np.zeros(len(of_units), int)


def means_by_unit(frame: pd.DataFrame, values: np.ndarray) -> np.ndarray:
    """Items' values [items, columns] as units' contributions to their mean, within levels of exposure."""
    return within_strata(by_unit(frame, values), levels(frame))


def contrast_of(frame: pd.DataFrame) -> np.ndarray:
    return np.array(familiarity(frame["popularity"].tolist()).contrast)


def _strata(frame: pd.DataFrame) -> np.ndarray:
    """Those of the frame, or a single one where nobody familiar has an unfamiliar counterpart."""
    found = strata(frame["length"].tolist(), frame["last_token"].tolist())
    return found if matched(contrast_of(frame), found).any() else np.zeros(len(frame), int)


def contrast(frame: pd.DataFrame, values: np.ndarray) -> np.ndarray:
    """Familiar less unfamiliar, matched: units' contributions of every column."""
    return by_unit(frame, matched_contrast(values, contrast_of(frame), _strata(frame)))


def density_columns(frame: pd.DataFrame) -> list[str]:
    """The density columns that slopes are given of."""
    names = [name for name in frame.columns if name.split("/")[0] in METRICS]
    return [name for name in names if name.split("/")[0] in WHOLLY_SHOWN or name.split("/")[1:3] in (["residual", "last"], ["normed", "last"])]


def exposure_rows(found: Found) -> list[Row]:
    """Of every model with states of its own, and of an untrained one: how density goes with exposure.

    `contrast`: familiar less unfamiliar, in the metric's unit. `slope`: Spearman's correlation with exposure within strata;
    `partial`: the same less what the model's own log-probability of the answer and the words' frequency explain.
    """
    rows: list[Row] = []
    sources = [("untrained", found.study.base_arm, "untrained"), *((arm, arm, "states") for arm in found.arms("states"))]
    for label, arm, measurement in sources:
        frames = found(measurement, arm)
        if not frames:
            continue
        columns = density_columns(frames[0])
        of = {name: _slopes(found, frames, columns, name) for name in ("contrast", "slope", "partial")}
        for position, column in enumerate(columns):
            metric, site, place, state = column.split("/")
            row: Row = {"arm": label, "metric": metric, "site": site, "place": place, "state": int(state)}
            rows.append(row | {name: numbers(values[position]) for name, values in of.items()})
    return rows


def _slopes(found: Found, frames: Sequence[pd.DataFrame], columns: Sequence[str], kind: str) -> list[Interval]:
    seeds = []
    for frame in frames:
        values = frame[list(columns)].to_numpy(float)
        if kind == "contrast":
            seeds.append(contrast(frame, values))
            continue
        covariates = None
        if kind == "partial":
            covariates = frame[[name for name in ("log_probability", "frequency") if name in frame]].to_numpy(float)
        try:
            seeds.append(by_unit(frame, rank_correlation(values, frame["popularity"].to_numpy(float), _strata(frame), covariates)))
        except UserError:  # nothing of popularity is left: no slope, and the row says so
            return [Interval(np.nan, np.nan, np.nan)] * len(columns)
    return intervals(found.estimate(seeds))


def null_rows(found: Found) -> list[Row]:
    """The base's density by state, averaged over items, beside what vectors of its own mean and covariance have (`sd` is of one
    vector), and an untrained model's states: means over seeds, in the residual stream at the last token."""
    base = found.study.base_arm
    rows: list[Row] = []
    frames = [found(name, base) for name in ("states", "untrained", "geometry")]
    if all(frames):
        for metric in METRICS:
            for state in range(states_of(frames[0][0])):
                column = f"{metric}/residual/last/{state}"
                trained, untrained = (float(np.mean([frame[column].mean() for frame in part])) for part in frames[:2])
                drawn = [frame[(frame["group"] == "both") & (frame["state"] == state)].iloc[0] for frame in frames[2]]
                mean, sd = (float(np.mean([row[f"gaussian_{name}/{metric}"] for row in drawn])) for name in ("mean", "sd"))
                values = {"base": trained, "gaussian": mean, "gaussian_sd": sd, "untrained": untrained}
                rows.append({"metric": metric, "state": state} | {name: finite(value) for name, value in values.items()})
    return rows


def rankme_rows(found: Found) -> list[Row]:
    """RankMe of the states at the last token, by model, group of items and state: a rank of the matrix, not of one vector."""
    rows: list[Row] = []
    for arm in found.arms("geometry"):
        frames = found("geometry", arm)
        for group, state in frames[0][["group", "state"]].itertuples(index=False):
            values = [float(frame[(frame["group"] == group) & (frame["state"] == state)]["rankme"].iloc[0]) for frame in frames]
            rows.append({"arm": arm, "group": str(group), "state": int(state)} | _over_seeds(values, (1.0, np.inf)))
    return rows


def block_columns(frame: pd.DataFrame, site: str, place: str, states: Iterable[int]) -> list[str]:
    return [name for state in states if (name := f"{METRIC}/{site}/{place}/{state}") in frame]


def states_of(frame: pd.DataFrame) -> int:
    """How many residual states (layers and embeddings) a frame holds."""
    return sum(name.startswith(f"{METRIC}/residual/last/") for name in frame.columns)


def change(found: Found, arm: str, site: str, place: str, states: Sequence[int]) -> list[np.ndarray]:
    """Units' contributions to (tuned less base) of familiar less unfamiliar, averaged over the states; last the same of the random deltas."""
    seeds = []
    for base, tuned, random in zip(found("states", found.study.base_arm), found("states", arm), found("random", arm), strict=True):
        columns = block_columns(base, site, place, states)
        before = base[columns].to_numpy(float).mean(axis=1)
        changed = tuned[columns].to_numpy(float).mean(axis=1) - before
        # Draws stand one after the other, each in the items' order.
        drawn = random[columns].to_numpy(float).mean(axis=1).reshape(-1, len(base)).mean(axis=0) - before
        seeds.append(contrast(base, np.stack([changed, drawn], axis=1)))
    return seeds


def erosion_rows(found: Found) -> list[Row]:
    """Change of effective rank, familiar less unfamiliar, by block of layers, site and place, beside the same under random deltas."""
    rows: list[Row] = []
    for arm in [arm for arm in found.arms("states") if arm != found.study.base_arm]:
        frame = found("states", arm)[0]
        blocks = {name: list(states) for name, states in thirds(states_of(frame) - 1).items() if len(states)}
        places = ["last", *(["subject"] if f"{METRIC}/residual/subject/0" in frame else [])]
        counts = _counts(found("states", arm))
        for place in places:
            for site in SITES:
                for block, states in blocks.items():
                    both = found.estimate(change(found, arm, site, place, states))
                    less = Estimate(both.value[:1] - both.value[1:], both.draws[:1] - both.draws[1:])
                    (tuned, random), (beyond,) = intervals(both), intervals(less)
                    row = {"arm": arm, "block": block, "site": site, "place": place} | numbers(tuned)
                    rows.append(row | {"random": numbers(random), "less_random": numbers(beyond)} | counts)
    return rows


def _counts(frames: Sequence[pd.DataFrame]) -> Row:
    taking_part = [matched(contrast_of(frame), strata(frame["length"].tolist(), frame["last_token"].tolist())) for frame in frames]
    return {"n": int(sum((contrast_of(frame) != 0).sum() for frame in frames)), "matched": int(sum(part.sum() for part in taking_part))}


def law_rows(found: Found) -> list[Row]:
    """KL(base || arm) in nats after the statement: of familiar and of unfamiliar items, for every arm."""
    rows = []
    for arm in found.arms("law"):
        for group, sign in (("familiar", 1), ("unfamiliar", -1)):
            frames = [frame[contrast_of(frame) == sign] for frame in found("law", arm)]
            (value,) = intervals(found.estimate([means_by_unit(frame, frame[["divergence"]].to_numpy(float)) for frame in frames]), (0.0, np.inf))
            rows.append({"arm": arm, "group": group} | numbers(value))
    return rows


def drift_rows(found: Found) -> list[Row]:
    """By block: relative change and stable rank of its matrices (means weighted by size), CKA and cosine with the base's states.

    Intervals are over seeds only; a single seed gives points.
    """
    rows: list[Row] = []
    for arm in found.arms("weights"):
        weights, geometry, states = (found(name, arm) for name in ("weights", "geometry", "states"))
        for block in BLOCKS:
            tables = [frame[frame["block"] == block] for frame in weights]
            if all(len(table) for table in tables):
                changed = [float(np.sqrt(np.average(table["relative_change"] ** 2, weights=table["size"]))) for table in tables]
                ranks = [_weighted(table, "stable_rank") for table in tables]
                rows += [{"arm": arm, "block": block, "what": "relative_change"} | _over_seeds(changed, (0.0, np.inf))]
                rows += [{"arm": arm, "block": block, "what": "stable_rank"} | _over_seeds(ranks, (1.0, np.inf))]
        layers = states_of(states[0]) - 1
        for block, chosen in {"embeddings": range(1), **thirds(layers)}.items():
            for group, sign in (("familiar", 1), ("unfamiliar", -1)):
                ckas = [float(frame[(frame["group"] == group) & frame["state"].isin(list(chosen))]["cka"].mean()) for frame in geometry]
                cosines = [
                    float(frame[contrast_of(frame) == sign][[f"cosine/last/{state}" for state in chosen]].to_numpy().mean()) for frame in states
                ]
                if len(chosen):
                    rows += [{"arm": arm, "block": block, "what": f"cka/{group}"} | _over_seeds(ckas, (-1.0, 1.0))]
                    rows += [{"arm": arm, "block": block, "what": f"cosine/{group}"} | _over_seeds(cosines, (-1.0, 1.0))]
    return rows


def _weighted(table: pd.DataFrame, column: str) -> float:
    known = table[np.isfinite(table[column])]
    return float(np.average(known[column], weights=known["size"])) if len(known) else float("nan")


def _over_seeds(values: Sequence[float], bounds: tuple[float, float] = (-np.inf, np.inf)) -> dict[str, float | None]:
    """The mean of single numbers of seeds, with a t interval; of one seed no interval."""
    return numbers(_seeds_interval(values, bounds))


def _seeds_interval(values: Sequence[float], bounds: tuple[float, float]) -> Interval:
    if len(values) == 1:
        return Interval(values[0], np.nan, np.nan)
    return intervals(estimate([np.array([[value]]) for value in values]), bounds)[0]


def lens_rows(found: Found) -> list[Row]:
    """By lens and state: log-probability of the right answer's first token, its share among the candidates, and how often it leads,
    over exposed items; how much of the last state's variance the arm's own translators explain; and what linear probes find, less
    their control."""
    rows: list[Row] = []
    for arm in found.arms("lens"):
        frames = [frame[frame["popularity"] != 0] for frame in found("lens", arm)]
        names = [name for name in frames[0].columns if name.startswith("lens/")]
        whole = found.estimate([means_by_unit(frame, frame[names].to_numpy(float)) for frame in frames])
        for position, name in enumerate(names):
            _, lens, what, state = name.split("/")
            bounds = (-np.inf, 0.0) if what == "log_probability" else (0.0, 1.0)
            (value,) = intervals(Estimate(whole.value[position : position + 1], whole.draws[position : position + 1]), bounds)
            rows.append({"arm": arm, "lens": lens, "what": what, "state": int(state)} | numbers(value))
        for layer in range(len(found("translators", arm)[0])):
            explained = [float(frame["explained"][layer]) for frame in found("translators", arm)]
            rows.append({"arm": arm, "lens": "own", "what": "explained", "state": layer} | _over_seeds(explained, (-np.inf, 1.0)))
        probes = [name for name in frames[0].columns if name.startswith("linear/probe/")]
        if probes:
            controls = [name.replace("/probe/", "/control/") for name in probes]
            parts = [means_by_unit(frame, np.hstack([frame[probes], frame[probes].to_numpy() - frame[controls].to_numpy()])) for frame in frames]
            for position, value in enumerate(intervals(found.estimate(parts))):
                what = "accuracy" if position < len(probes) else "selectivity"
                rows.append({"arm": arm, "lens": "linear", "what": what, "state": position % len(probes)} | numbers(value))
    return rows


def restoration_seeds(found: Found, arm: str) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """What was restored, and units' changes of the right candidate's probability by it, over exposed items; first the whole loss."""
    names: list[tuple[str, str]] = []
    seeds = []
    for frame in found("restoration", arm):
        exposed = frame[frame["popularity"] != 0]
        values = {str(label): part["probability"].to_numpy(float) for label, part in exposed.groupby("restored", sort=False)}
        unchanged = values[block_label(())]
        columns = {("loss", "all"): values[block_label(BLOCKS)] - unchanged}
        for what, of_block in (("shapley", shapley), ("recovery", recovery), ("damage", damage)):
            columns |= {(what, block): gained for block, gained in of_block(values).items()}
        for label, value in values.items():
            kind, _, part = label.partition("/")
            if kind != "blocks":
                columns[kind, part] = value - unchanged
        # A control that some seed does not have (no match outside its block) is left out of all.
        names = [name for name in names if name in columns] if names else list(columns)
        seeds.append((exposed[exposed["restored"] == block_label(())], columns))
    return names, [means_by_unit(frame, np.stack([columns[name] for name in names], axis=1)) for frame, columns in seeds]


def restoration_rows(found: Found) -> list[Row]:
    """What setting parts back to the base does to the right candidate's probability, and to the task (nats a token of its answers).

    `loss` is base less tuned. `share` is the value over the loss; None where the loss is within noise.
    """
    rows: list[Row] = []
    for arm in found.arms("restoration"):
        names, seeds = restoration_seeds(found, arm)
        whole = found.estimate(seeds)
        values = intervals(whole)
        lost = values[0].excludes_zero()
        for position, ((what, part), value) in enumerate(zip(names, values, strict=True)):
            share = interval(whole.value[position] / whole.value[0], whole.draws[position] / whole.draws[0]) if lost else None
            rows.append({"arm": arm, "what": what, "part": part} | numbers(value) | {"share": None if share is None else numbers(share)})
        rows += _task_rows(found, arm)
    return rows


def _task_rows(found: Found, arm: str) -> list[Row]:
    frames = found("restoration/task", arm)
    if not frames:
        return []
    labels = {"all": block_label(BLOCKS), **{block: block_label((block,)) for block in BLOCKS}}
    seeds = []
    for frame in frames:
        values = {str(label): part["log_probability"].to_numpy(float) for label, part in frame.groupby("restored", sort=False)}
        unchanged = block_label(())
        columns = [values[label] - values[unchanged] for label in labels.values()]
        seeds.append(means_by_unit(frame[frame["restored"] == unchanged], np.stack(columns, axis=1)))
    return [
        {"arm": arm, "what": "task", "part": part} | numbers(value) | {"share": None}
        for part, value in zip(labels, intervals(found.estimate(seeds)), strict=True)
    ]


def patching_rows(found: Found) -> list[Row]:
    """The right candidate's share with the base's state of the subject in its place after each layer, less that without."""
    rows: list[Row] = []
    for arm in found.arms("patching"):
        frames = [frame[(frame["popularity"] != 0) & frame["tuned"].notna()] for frame in found("patching", arm)]
        names = [name for name in frames[0].columns if name.startswith("state/")]
        seeds = [means_by_unit(frame, frame[[*names, "base"]].to_numpy(float) - frame[["tuned"]].to_numpy(float)) for frame in frames]
        values = intervals(found.estimate(seeds))
        rows += [{"arm": arm, "state": int(name.split("/")[1])} | numbers(value) for name, value in zip(names, values, strict=False)]
        rows.append({"arm": arm, "state": None} | numbers(values[-1]))
    return rows


class Curves(NamedTuple):
    """A record's curves, what the base knows of every item, every item's unit ("none" where no curve has it), and the units' strata."""

    curves: dict[str, Curve]
    base: Known
    units: np.ndarray
    strata: dict[str, int]


def _relearning(frame: pd.DataFrame) -> Curves:
    count = int(frame["item"].max()) + 1
    base = Known(np.zeros(count, bool), np.zeros(count))
    base.right[frame["item"]], base.probability[frame["item"]] = frame["base_right"], frame["base_probability"]
    curves = {}
    for name, part in frame.groupby("curve", sort=False):
        right, probability = (part.pivot(index="step", columns="item", values=column) for column in ("right", "probability"))
        indices = [int(item) for item in right.columns]
        curves[str(name)] = Curve([int(step) for step in right.index], indices, right.to_numpy(bool), probability.to_numpy(float))
    units = np.full(count, "none", object)
    units[frame["item"]] = frame["unit"].astype(str)
    return Curves(curves, base, units, dict(zip(np.unique(frame["unit"].astype(str)), levels(frame).tolist(), strict=True)))


def recoverability_rows(found: Found) -> list[Row]:
    """Steps to regain what was lost and to gain as much for the first time, the savings, and what ten unrelated facts bring back.

    `lost` is base less tuned in the right candidate's probability before the first step. Savings and the share brought back are
    None where that is within noise. Intervals resample units within seeds; with several seeds they are at least that of the seeds' t law.
    """
    rows: list[Row] = []
    for arm in found.arms("recoverability"):
        frames = found("recoverability", arm)
        before = [frame[(frame["curve"] == FORGOTTEN) & (frame["step"] == 0)] for frame in frames]
        (lost,) = intervals(
            found.estimate([means_by_unit(part, (part["base_probability"] - part["probability"]).to_numpy()[:, None]) for part in before])
        )
        read = [_relearning(frame) for frame in frames]
        of_seeds = [_relearnt(seed) for seed in read]
        row: Row = {"arm": arm, "lost": numbers(lost), "savings": None, "brought_back": None}
        row |= {"bound": sorted({saved.bound for saved, _ in of_seeds})}
        row |= {name: [_rounded(getattr(saved, name)) for saved, _ in of_seeds] for name in ("relearnt", "learnt")}
        if lost.low > 0:
            again = [[_relearnt(_resampled(seed, draw)) for seed in read] for draw in range(RESAMPLES)]
            row["savings"] = _return([saved.value for saved, _ in of_seeds], [[saved.value for saved, _ in seeds] for seeds in again], most=1.0)
            row["brought_back"] = _return([share for _, share in of_seeds], [[share for _, share in seeds] for seeds in again])
        rows.append(row)
    return rows


def _relearnt(read: Curves) -> tuple[Savings, float | None]:
    items = [Item(question=str(unit), answer="none") for unit in read.units]
    return savings(read.curves, read.base), spurious(read.curves, items, read.base)


def _return(of_seeds: Sequence[float | None], again: Sequence[Sequence[float | None]], most: float = np.inf) -> dict[str, float | None] | None:
    """The mean over seeds with its interval; `again` are the seeds' values of units drawn again. None where some seed has no value."""
    known = _known(of_seeds)
    drawn = [np.mean(values) for seeds in again if (values := _known(seeds)) is not None]
    if known is None or len(drawn) <= len(again) / 2:
        return None
    of_units = interval(float(np.mean(known)), np.array(drawn))
    if len(known) == 1:
        return numbers(of_units)
    by_seeds = _seeds_interval(known, (-np.inf, most))
    return numbers(Interval(by_seeds.value, min(by_seeds.low, of_units.low), max(by_seeds.high, of_units.high)))


def _known(values: Sequence[float | None]) -> list[float] | None:
    """The values where there are all."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _resampled(read: Curves, draw: int) -> Curves:
    """Units drawn again within strata, with all their items; copies are items of their own, but of one unit, which must stay on one side.

    The same units are drawn of every seed that has them.
    """
    names, strata = np.array(list(read.strata)), np.array(list(read.strata.values()))
    generator = np.random.default_rng(draw)
    drawn = np.concatenate([generator.choice(names[strata == stratum], (strata == stratum).sum()) for stratum in np.unique(strata)])
    items = [np.flatnonzero(read.units == unit) for unit in drawn]
    source = np.concatenate(items)
    curves = {}
    for name, curve in read.curves.items():
        places = np.full(len(read.units), -1)
        places[curve.indices] = range(len(curve.indices))
        indices = np.flatnonzero(places[source] >= 0)
        columns = places[source[indices]]
        curves[name] = Curve(curve.steps, indices.tolist(), curve.right[:, columns], curve.probability[:, columns])
    base = Known(read.base.right[source], read.base.probability[source])
    copies = {f"{copy}": int(stratum) for copy, stratum in enumerate(np.sort(strata))}
    return Curves(curves, base, np.repeat(list(copies), [len(of_unit) for of_unit in items]), copies)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
