"""Density: how many coordinates share a hidden state's energy, how that varies with exposure, and how tuning changes it.

Two parts: density at names, as AUROC of familiar against unfamiliar ones (`separation.py`), and density at knowledge statements, in this file,
which a study without knowledge items lacks. Mathematics of the second: `probes/density.py`, `probes/nulls.py`, `probes/knowledge/exposure.py`.
Differences between models are paired over units. Familiar and unfamiliar items are compared within strata of the same length and last token, where
such strata exist (`matched` counts the items).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pydantic import Field

from evals.display.cells import FEW_COLUMNS, Columns, Table, cell, over, table
from evals.display.chart import Axis, Cells, Chart, Panel, Series, all_scaled, exposure_axis, scaled
from evals.measures.dose import BlockSeparated, block_table, exposure_table, exposure_verdicts, in_blocks, names_table, names_verdicts
from evals.measures.inputs import Inputs
from evals.measures.long import matrix
from evals.measures.measure import Measure, Reading, Settings
from evals.measures.names import Names
from evals.measures.registry import register
from evals.measures.separation import (
    UNTRAINED,
    Graded,
    LayerSeparated,
    Separated,
    SeparationChange,
    by_layer,
    change_table,
    changed,
    dose_table,
    emergence_chart,
    graded,
    layer_chart,
    separated,
    separation_table,
)
from evals.measures.states import States, layers_of
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import by_unit, contrast, contrast_of, intervals, over_seeds, strata_of
from evals.statistics.intervals import Estimate
from evals.statistics.judged import Verdict
from evals.statistics.value import UNKNOWN, Value, finite, value_of, values_of
from probes.density import METRICS, SITES
from probes.internals.blocks import thirds
from probes.knowledge.exposure import matched, rank_correlation, strata
from probes.knowledge.familiarity import familiarity
from proxytune.errors import UserError

METRIC = "effective_rank"
WHOLLY_SHOWN = ("e5", METRIC)  # at every site and place; other metrics only in the residual stream at the last token
SHOWN = (("e5", "E5"), (METRIC, "effective rank"))
UNCHANGED = "unchanged by construction"
LEFT_OUT = " Some layers of many are shown; all are in results.json."


@dataclass(frozen=True)
class Exposure:
    """One model and one column (metric, site, place, state). `contrast` is familiar minus unfamiliar in the metric's unit, matched. `correlation` is
    Spearman's with exposure within strata. `partial` is the same, controlled for the model's own log-probability of the answer and for the words'
    frequency."""

    arm: str
    metric: str
    site: str
    place: str
    state: int
    contrast: Value
    correlation: Value
    partial: Value


@dataclass(frozen=True)
class Null:
    """The base's density after a layer, beside that of Gaussian vectors with the same mean and covariance (`gaussian_sd`: standard deviation of one
    vector) and that of an untrained model. Means over items and seeds, in the residual stream at the last token."""

    metric: str
    state: int
    base: Value
    gaussian: Value
    gaussian_sd: Value
    untrained: Value


@dataclass(frozen=True)
class Rank:
    """RankMe of the states at the last token of a group of items. It is a rank of the matrix of states, not of one vector."""

    arm: str
    group: str
    state: int
    rankme: Value


@dataclass(frozen=True)
class Change:
    """Effective rank, arm minus base, familiar minus unfamiliar, by block of layers, site and place. `random` is the same under random deltas;
    `beyond_random` is `change` minus `random`. `matched` of `n` familiar and unfamiliar items have a counterpart."""

    arm: str
    block: str
    site: str
    place: str
    change: Value
    random: Value
    beyond_random: Value
    n: int
    matched: int


@dataclass(frozen=True)
class BucketChange:
    """Effective rank of the residual stream at the last token, arm minus base, by state and bucket of exposure."""

    arm: str
    state: int
    bucket: str
    change: Value


@dataclass(frozen=True)
class DensityFound:
    exposure: tuple[Exposure, ...]
    nulls: tuple[Null, ...]
    ranks: tuple[Rank, ...]
    changes: tuple[Change, ...]
    buckets: tuple[BucketChange, ...]
    auroc: tuple[Separated, ...] = ()
    auroc_layers: tuple[LayerSeparated, ...] = ()
    auroc_graded: tuple[Graded, ...] = ()
    auroc_changes: tuple[SeparationChange, ...] = ()
    auroc_blocks: tuple[BlockSeparated, ...] = ()
    exposure_verdicts: tuple[Verdict, ...] = ()
    names_verdicts: tuple[Verdict, ...] = ()


class DensitySettings(Settings):
    names: bool = Field(default=True, description="also read the entities' names")
    statements: bool = Field(default=True, description="also read the knowledge statements")


class Density(Measure[DensityFound]):
    name = "density"
    question = "How dense are hidden states, how does that vary with exposure, and how does tuning change it?"
    controls = "Matched for length and last token; an untrained model; Gaussian vectors; random deltas of the same norm."
    reads = frozenset({"knowledge.statement", "knowledge.popularity", "entities"})
    settings = DensitySettings
    summary = DensityFound

    def readings(self, inputs: Inputs, settings: DensitySettings) -> list[Reading]:
        return [*([States()] if settings.statements and inputs.data.knowledge else []), *([Names()] if settings.names and inputs.entities[0] else [])]

    def summarize(self, records: Recorded, settings: Settings) -> DensityFound:
        base = records.study.base_arm
        tuned = [arm for arm in records.arms("states") if arm != base]
        sources = [(UNTRAINED, base, UNTRAINED), *((arm, arm, "states") for arm in records.arms("states"))]
        return DensityFound(
            tuple(row for label, arm, frame in sources for row in _exposure(records, label, arm, frame)),
            tuple(_nulls(records)),
            tuple(row for arm in records.arms("geometry") for row in _ranks(records, arm)),
            tuple(row for arm in tuned for row in _changes(records, arm)),
            tuple(row for arm in tuned for row in _bucket_changes(records, arm)),
            separated(records),
            tuple(by_layer(records)),
            tuple(graded(records)),
            tuple(changed(records)),
            tuple(in_blocks(records)),
            tuple(exposure_verdicts(records)),
            tuple(names_verdicts(records)),
        )

    def tables(self, summary: DensityFound, header: Header) -> list[Table]:
        return [
            *separation_table(summary.auroc, summary.auroc_graded, header),
            *dose_table(summary.auroc, header),
            *block_table([row for row in summary.auroc_blocks if row.world is None and summary.exposure_verdicts], header),
            *change_table(summary.auroc_changes, header, UNCHANGED),
            *_exposure_table(summary, header),
            *_null_table(summary),
            *_rank_table(summary, header),
            *_change_table(summary, header),
            *exposure_table(summary.exposure_verdicts, header),
            *names_table(summary.names_verdicts, header),
        ]

    def verdicts(self, summary: DensityFound) -> Sequence[Verdict]:
        return (*summary.exposure_verdicts, *summary.names_verdicts)

    def charts(self, summary: DensityFound, header: Header) -> Iterable[Chart]:
        names = [*layer_chart(summary.auroc_layers, summary.auroc, header), *emergence_chart(summary.auroc, header)]
        return [*names, *_heat_map(summary, header), *_by_layer(summary, header)]


# What is concluded


Where = tuple[str, str, Sequence[int]]  # a site, a place and the states that are averaged


def density_change(records: Recorded, arm: str, places: Sequence[Where]) -> list[np.ndarray]:
    """For each seed, units' contributions [units, 2 * places] to familiar minus unfamiliar: arm minus base at each place, then the same under
    random deltas."""
    base = records.study.base_arm
    seeds = []
    for prompts, *frames in zip(records("prompts", base), records("states", base), records("states", arm), records("random", arm), strict=True):
        before, after = (_means(frame, len(prompts), places) for frame in frames[:2])
        drawn = np.mean([_means(frame, len(prompts), places) for frame in draws(frames[2])], axis=0)
        seeds.append(contrast(prompts, np.hstack([after - before, drawn - before])))
    return seeds


def _means(frame: pd.DataFrame, items: int, places: Sequence[Where]) -> np.ndarray:
    """Effective rank [items, places], averaged over each place's states."""
    values, names = matrix(frame, items, metric=METRIC)
    of_column = list(zip(names["site"].astype(str), names["place"].astype(str), names["state"], strict=True))
    columns = {name: position for position, name in enumerate(of_column)}
    return np.stack([values[:, [columns[site, place, state] for state in states]].mean(axis=1) for site, place, states in places], axis=1)


def draws(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """One long frame for each draw of random deltas."""
    return [part.drop(columns="draw") for _, part in frame.groupby("draw", sort=True)]


def _exposure(records: Recorded, label: str, arm: str, frame: str) -> Iterator[Exposure]:
    frames, prompts = records(frame, arm), records("prompts", arm)
    if not frames:
        return
    read = [matrix(each, len(items)) for each, items in zip(frames, prompts, strict=True)]
    columns = read[0][1]
    wanted = columns["metric"].isin(METRICS) & (
        columns["metric"].isin(WHOLLY_SHOWN) | (columns["site"].isin(["residual", "normed"]) & (columns["place"] == "last"))
    )
    seeds = [(items, values[:, wanted.to_numpy()], _covariates(values, columns, items)) for items, (values, _) in zip(prompts, read, strict=True)]
    contrasts = values_of(intervals(records.estimate([contrast(items, values) for items, values, _ in seeds])))
    correlations = _correlations(records, [(items, values, None) for items, values, _ in seeds])
    partial = _correlations(records, seeds)
    names = columns[wanted][["metric", "site", "place", "state"]].itertuples(index=False)
    for (metric, site, place, state), *values in zip(names, contrasts, correlations, partial, strict=True):
        yield Exposure(label, str(metric), str(site), str(place), int(state), *values)


def _covariates(values: np.ndarray, columns: pd.DataFrame, prompts: pd.DataFrame) -> np.ndarray:
    of_answer = values[:, (columns["metric"] == "log_probability").to_numpy()]
    return of_answer if "frequency" not in prompts else np.hstack([of_answer, prompts[["frequency"]].to_numpy(float)])


def _correlations(records: Recorded, seeds: Sequence[tuple[pd.DataFrame, np.ndarray, np.ndarray | None]]) -> list[Value]:
    found = []
    for prompts, values, covariates in seeds:
        try:
            found.append(by_unit(prompts, rank_correlation(values, prompts["popularity"].to_numpy(float), strata_of(prompts), covariates)))
        except UserError:  # popularity does not vary within strata: there is no correlation, and the row shows n/a
            return [UNKNOWN] * values.shape[1]
    return values_of(intervals(records.estimate(found)))


def _nulls(records: Recorded) -> Iterator[Null]:
    base = records.study.base_arm
    frames = [records(name, base) for name in ("prompts", "states", UNTRAINED, "geometry")]
    if not all(frames):
        return
    items = [len(prompts) for prompts in frames[0]]
    for metric in METRICS:
        wanted = {"metric": metric, "site": "residual", "place": "last"}
        trained, untrained = (
            np.mean([matrix(frame, count, **wanted)[0].mean(axis=0) for frame, count in zip(part, items, strict=True)], axis=0)
            for part in frames[1:3]
        )
        for state, (of_base, of_untrained) in enumerate(zip(trained, untrained, strict=True)):
            drawn = [frame[(frame["group"] == "both") & (frame["state"] == state)].iloc[0] for frame in frames[3]]
            mean, sd = (float(np.mean([row[f"gaussian_{name}_{metric}"] for row in drawn])) for name in ("mean", "sd"))
            yield Null(metric, state, *(Value(finite(number)) for number in (of_base, mean, sd, of_untrained)))


def _ranks(records: Recorded, arm: str) -> Iterator[Rank]:
    frames = records("geometry", arm)
    for group, state in frames[0][["group", "state"]].itertuples(index=False):
        values = [float(frame[(frame["group"] == group) & (frame["state"] == state)]["rankme"].iloc[0]) for frame in frames]
        yield Rank(arm, str(group), int(state), value_of(over_seeds(values, (1.0, np.inf))))


def _changes(records: Recorded, arm: str) -> Iterator[Change]:
    frame = records("states", arm)[0]
    sites = frame.loc[frame["metric"] == METRIC, "place"].unique()
    blocks = [(name, list(states)) for name, states in thirds(layers_of(frame)).items() if len(states)]
    rows = [(block, site, str(place), states) for place in sites for site in SITES for block, states in blocks]
    both = records.estimate(density_change(records, arm, [(site, place, states) for _, site, place, states in rows]))
    half = len(rows)
    beyond = Estimate(both.value[:half] - both.value[half:], both.draws[:half] - both.draws[half:])
    found = values_of([*intervals(both), *intervals(beyond)])
    n, counterparts = _counts(records("prompts", arm))
    for position, (block, site, place, _) in enumerate(rows):
        change, random, beyond_random = (found[position + shift] for shift in (0, half, 2 * half))
        yield Change(arm, block, site, place, change, random, beyond_random, n, counterparts)


def _counts(frames: Sequence[pd.DataFrame]) -> tuple[int, int]:
    """The number of familiar and unfamiliar items of all seeds, and how many of them have a counterpart of the same length and last token."""
    taking_part = [matched(contrast_of(frame), strata(frame["length"].tolist(), frame["last_token"].tolist())) for frame in frames]
    return int(sum((contrast_of(frame) != 0).sum() for frame in frames)), int(sum(part.sum() for part in taking_part))


def _bucket_changes(records: Recorded, arm: str) -> Iterator[BucketChange]:
    base = records.study.base_arm
    labels: tuple[str, ...] = ()
    seeds = []
    for prompts, before, after in zip(records("prompts", base), records("states", base), records("states", arm), strict=True):
        old, new = (matrix(frame, len(prompts), metric=METRIC, site="residual", place="last")[0] for frame in (before, after))
        sorted_in = familiarity(prompts["popularity"].tolist())
        labels = sorted_in.labels
        inside = np.array([[bucket == label for label in labels] for bucket in sorted_in.buckets])
        of_buckets = np.where(inside[:, None, :], (new - old)[:, :, None], np.nan)
        seeds.append(by_unit(prompts, of_buckets.reshape(len(prompts), -1)))
    for position, value in enumerate(values_of(intervals(records.estimate(seeds)))):
        yield BucketChange(arm, position // len(labels), labels[position % len(labels)], value)


# What is shown


def _exposure_table(summary: DensityFound, header: Header) -> list[Table]:
    rows = [row for row in summary.exposure if (row.site, row.place) == ("normed", "last")]
    last = max((row.state for row in rows), default=0)
    columns: Columns = {}
    for metric, name in SHOWN:
        chosen = [row for row in rows if row.metric == metric and row.state == last]
        columns[f"{name}: contrast"] = {row.arm: cell(row.contrast, 1000) for row in chosen}
        columns[f"{name}: correlation"] = {row.arm: cell(row.correlation, 100) for row in chosen}
        columns[f"{name}: partial correlation"] = {row.arm: cell(row.partial, 100) for row in chosen}
    note = (
        "Contrast: familiar minus unfamiliar, in thousandths, matched for length and last token. Correlation: Spearman's with exposure, in "
        "hundredths; partial: controlled for the model's own log-probability of the answer and for the words' frequency. E5 (energy in the top "
        f"5 % of coordinates): higher is sparser; effective rank: higher is denser. 95 % intervals, {over(header.runs)}."
    )
    title = f"How density varies with exposure (last token, after layer {last} and the final norm)"
    return table(title, header.ordered([row.arm for row in rows]), columns, note, first="model")


def _null_table(summary: DensityFound) -> list[Table]:
    columns: Columns = {}
    for metric, name in SHOWN:
        chosen = [row for row in summary.nulls if row.metric == metric]
        columns[f"{name}: base"] = {str(row.state): _plain(row.base) for row in chosen}
        columns[f"{name}: Gaussian (sd)"] = {str(row.state): f"{_plain(row.gaussian)} ({_plain(row.gaussian_sd)})" for row in chosen}
        columns[f"{name}: untrained"] = {str(row.state): _plain(row.untrained) for row in chosen}
    states = [row.state for row in summary.nulls]
    shown = some_states(states)
    note = (
        "Density of one state, averaged over items (residual stream, last token). Gaussian: vectors with the states' own mean and covariance; in "
        f"parentheses the standard deviation of one vector. Means over seeds.{LEFT_OUT if len(shown) < len(set(states)) else ''}"
    )
    return table("Density by layer beside its nulls", [str(state) for state in shown], columns, note, first="after layer")


def _rank_table(summary: DensityFound, header: Header) -> list[Table]:
    rows = [row for row in summary.ranks if row.group == "both"]
    shown = some_states([row.state for row in rows])
    columns = {f"layer {state}": {row.arm: cell(row.rankme) for row in rows if row.state == state} for state in shown}
    note = (
        "Exp of the entropy of the normalized singular values of the states of all familiar and unfamiliar items (residual stream, last token): how "
        "many directions the states use, at most the width. Intervals are over seeds; a single seed has none."
    )
    return table("RankMe", header.ordered([row.arm for row in rows]), columns, note)


def some_states(of_rows: Sequence[int]) -> list[int]:
    """All states if they are few, otherwise five from first to last."""
    states = sorted(set(of_rows))
    return states if len(states) <= FEW_COLUMNS else [states[len(states) * part // 4 - (part == 4)] for part in range(5)]


def _plain(value: Value) -> str:
    return "n/a" if value.value is None else f"{value.value:.3f}"


def _change_table(summary: DensityFound, header: Header) -> list[Table]:
    rows = summary.changes
    if not rows:
        return []

    def column(name: str, block: str, site: str, place: str) -> dict[str, str]:
        return {row.arm: cell(getattr(row, name), 1000) for row in rows if (row.block, row.site, row.place) == (block, site, place)}

    columns: Columns = {block: column("change", block, "residual", "last") for block in ("low", "middle", "high")}
    columns["low, beyond random"] = column("beyond_random", "low", "residual", "last")
    columns["low, at the subject"] = column("change", "low", "residual", "subject")
    columns["low, rotated"] = column("change", "low", "rotated", "last")
    columns = {name: cells for name, cells in columns.items() if cells}
    columns["low"] |= dict.fromkeys(header.proxied, UNCHANGED)
    note = (
        "Effective rank of the residual stream, arm minus base, familiar minus unfamiliar; below zero is erosion. Blocks: thirds of the layers. "
        "Beyond random: minus the same under random deltas of the same norm. At the subject: at the subject's last token instead of the statement's. "
        f"Rotated: in another basis. {_matched(rows[0])} 95 % intervals, {over(header.runs)}."
    )
    arms = header.ordered([*header.proxied, *(row.arm for row in rows)])
    return table("Erosion: change of density (thousandths)", arms, columns, note)


def _matched(row: Change) -> str:
    if row.matched:
        return f"{row.matched} of {row.n} familiar and unfamiliar items have a counterpart of the same length and last token; these are compared."
    return f"None of the {row.n} familiar and unfamiliar items has a counterpart of the same length and last token; they are compared as they are."


def _heat_map(summary: DensityFound, header: Header) -> Iterator[Chart]:
    if not summary.buckets:
        return
    panels = []
    for arm in dict.fromkeys(row.arm for row in summary.buckets):
        rows = [row for row in summary.buckets if row.arm == arm]
        labels = tuple(dict.fromkeys(row.bucket for row in rows))
        states = sorted({row.state for row in rows})
        of_states = [[scaled(row.change, 1000) for row in rows if row.state == state] for state in states]
        lines = tuple(block[0] for block in thirds(len(states) - 1).values() if len(block))
        names = tuple(label.split("=")[1] for label in labels)
        cells = Cells(names, tuple(map(str, states)), tuple(map(tuple, of_states)), lines)
        panels.append(Panel((cells,), arm, exposure_axis(labels), Axis("after layer (0: embeddings)")))
    note = (
        "red is denser, blue is sparser; bold: the 95 % interval excludes zero (by chance, one in twenty does)\n"
        "lines separate embeddings, low, middle and high"
    )
    title = f"{header.title}: change of density (arm minus base), residual stream at the last token"
    yield Chart("density-change", title, tuple(panels), note, "effective rank, thousandths", paired=True, shared=True)


def _by_layer(summary: DensityFound, header: Header) -> Iterator[Chart]:
    """Whether density separates familiar from unfamiliar items before any tuning, and whether the architecture alone does."""
    if not summary.exposure:
        return
    panels = []
    for metric, title in ((METRIC, "effective rank (higher is denser)"), ("e5", "E5 (higher is sparser)")):
        bands = []
        for arm, name in ((UNTRAINED, UNTRAINED), (header.base, "base")):
            rows = [row for row in summary.exposure if (row.arm, row.metric, row.site, row.place) == (arm, metric, "residual", "last")]
            bands.append(Series("band", all_scaled([row.contrast for row in rows], 1000), tuple(float(row.state) for row in rows), label=name))
        x = Axis("residual stream after layer (0: embeddings)", integers=True)
        panels.append(Panel(tuple(bands), title, x, Axis("familiar minus unfamiliar (thousandths)"), zero=True))
    yield Chart("density-by-layer", f"{header.title}: density at the last token, with 95 % intervals", tuple(panels), across=2)


register(Density())
