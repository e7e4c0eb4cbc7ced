"""Drift: how far tuning moved the next-token distribution (KL to the base), the states (CKA, cosine) and the weights.

Mathematics: `probes/drift.py`. The readings are `Divergence` (`answers.py`) and `States` (`states.py`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from evals.display.cells import Columns, Table, cell, over, table
from evals.display.chart import Axis, Chart, Panel, Series, all_scaled
from evals.measures.answers import Divergence
from evals.measures.density import UNCHANGED
from evals.measures.inputs import Inputs
from evals.measures.long import matrix
from evals.measures.measure import Measure, Reading, Settings
from evals.measures.registry import register
from evals.measures.states import States, layers_of
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import contrast_of, intervals, means_by_unit, over_seeds
from evals.statistics.value import Value, value_of
from probes.internals.blocks import BLOCKS, thirds

GROUPS = (("familiar", 1), ("unfamiliar", -1))
INFINITE = "infinite"
DRAWN = (
    ("relative_change", "", "change of the weights (% of their norm)", 100.0),
    ("cka", "familiar", "CKA with the base's states, familiar", 1.0),
    ("cosine", "familiar", "cosine with the base's states, familiar", 1.0),
)


@dataclass(frozen=True)
class Distance:
    """KL(base || arm) of the next-token distribution after the statement, in nats, for familiar or for unfamiliar items. Noted as infinite for an arm
    that bans tokens."""

    arm: str
    group: str
    kl: Value


@dataclass(frozen=True)
class BlockDrift:
    """One block: `relative_change` and `stable_rank` of its matrices (means weighted by size), `cka` and `cosine` of its states with the
    base's, for each group of items. Intervals are over seeds only."""

    arm: str
    block: str
    what: str
    group: str
    value: Value


@dataclass(frozen=True)
class Drifted:
    distances: tuple[Distance, ...]
    blocks: tuple[BlockDrift, ...]


class Drift(Measure[Drifted]):
    name = "drift"
    question = "How far did tuning move the next-token distribution (KL to the base), the states and the weights?"
    controls = "KL after a statement is the one distance that every arm has; familiar and unfamiliar items separately."
    needs = frozenset({"knowledge.statement", "knowledge.popularity"})
    summary = Drifted

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        return [Divergence("distribution", "knowledge", "statement"), States()]

    def summarize(self, records: Recorded, settings: Settings) -> Drifted:
        distances = [row for arm in records.arms("distribution") for row in _distances(records, arm)]
        return Drifted(tuple(distances), tuple(row for arm in records.arms("weights") for row in _block_drifts(records, arm)))

    def tables(self, summary: Drifted, header: Header) -> list[Table]:
        return [*_output_table(summary, header), *_weight_table(summary, header)]

    def charts(self, summary: Drifted, header: Header) -> Iterable[Chart]:
        panels = [_block_panel(summary, *shown) for shown in DRAWN] if summary.blocks else []
        if summary.distances:
            panels.append(_distance_panel(summary, header))
        if panels:
            title = f"{header.title}: drift from the base, with 95 % intervals where there are any"
            yield Chart("drift", title, tuple(panels), across=2)


# What is concluded


def _distances(records: Recorded, arm: str) -> Iterator[Distance]:
    for group, sign in GROUPS:
        frames = [frame[contrast_of(frame) == sign] for frame in records("distribution", arm)]
        if any(np.isinf(frame["divergence"]).any() for frame in frames):
            yield Distance(arm, group, Value(None, note=INFINITE))
            continue
        seeds = [means_by_unit(frame, frame[["divergence"]].to_numpy(float)) for frame in frames]
        yield Distance(arm, group, value_of(intervals(records.estimate(seeds), (0.0, np.inf))[0]))


def _block_drifts(records: Recorded, arm: str) -> Iterator[BlockDrift]:
    weights, geometry = records("weights", arm), records("geometry", arm)
    for block in BLOCKS:
        tables = [frame[frame["block"] == block] for frame in weights]
        if all(len(part) for part in tables):
            changed = [float(np.sqrt(np.average(part["relative_change"] ** 2, weights=part["size"]))) for part in tables]
            ranks = [_weighted(part, "stable_rank") for part in tables]
            yield BlockDrift(arm, block, "relative_change", "", value_of(over_seeds(changed, (0.0, np.inf))))
            yield BlockDrift(arm, block, "stable_rank", "", value_of(over_seeds(ranks, (1.0, np.inf))))
    layers = layers_of(records("states", arm)[0])
    read = list(zip(records("prompts", arm), records("states", arm), strict=True))
    for block, chosen in {"embeddings": range(1), **thirds(layers)}.items():
        for group, sign in GROUPS if len(chosen) else ():
            ckas = [float(frame[(frame["group"] == group) & frame["state"].isin(list(chosen))]["cka"].mean()) for frame in geometry]
            cosines = []
            for prompts, states in read:
                values, _ = matrix(states, len(prompts), metric="cosine", place="last", state=list(chosen))
                cosines.append(float(values[contrast_of(prompts) == sign].mean()))
            yield BlockDrift(arm, block, "cka", group, value_of(over_seeds(ckas, (-1.0, 1.0))))
            yield BlockDrift(arm, block, "cosine", group, value_of(over_seeds(cosines, (-1.0, 1.0))))


def _weighted(part: pd.DataFrame, column: str) -> float:
    known = part[np.isfinite(part[column])]
    return float(np.average(known[column], weights=known["size"])) if len(known) else float("nan")


# What is shown


def _output_table(summary: Drifted, header: Header) -> list[Table]:
    columns: Columns = {f"KL, {group}": {row.arm: cell(row.kl, 1, 3) for row in summary.distances if row.group == group} for group, _ in GROUPS}
    if summary.blocks:
        for what, name in (("cka", "CKA"), ("cosine", "cosine")):
            for block in ("low", "high"):
                columns[f"{name}, {block}"] = _column(summary, what, "familiar", block, 1, 3)
        columns["CKA, low"] |= dict.fromkeys(header.proxied, UNCHANGED)
    note = (
        "KL(base || arm) after the statement, in nats, for familiar and unfamiliar items: the one distance that every arm has "
        "(infinite where words are banned, which the base may say). CKA (all states "
        "together) and cosine (prompt by prompt) with the base's states of familiar statements at the last token: 1 is unchanged; an expert has "
        f"another shape and has none. 95 % intervals, {over(header.runs)}; for CKA and cosine over seeds only."
    )
    arms = [*(row.arm for row in summary.distances), *header.proxied, *(row.arm for row in summary.blocks)]
    shown = header.ordered(list(dict.fromkeys(arms))) if summary.distances or summary.blocks else []
    return table("Drift from the base: outputs and states", shown, columns, note)


def _weight_table(summary: Drifted, header: Header) -> list[Table]:
    columns: Columns = {}
    for what, name, scale in (("relative_change", "change, {} (%)", 100), ("stable_rank", "stable rank, {}", 1)):
        columns |= {name.format(block): _column(summary, what, "", block, scale, 2) for block in ("low", "middle", "high")}
    note = (
        "Change: Frobenius norm of tuned minus base over the base's, in per cent; stable rank: of that change, 1 is a single direction (means over "
        "matrices, weighted by size); n/a where nothing changed. Intervals are over seeds; a single seed has none."
    )
    arms = header.ordered([row.arm for row in summary.blocks])
    return table("Drift of the weights", arms, {name: cells for name, cells in columns.items() if cells}, note)


def _column(summary: Drifted, what: str, group: str, block: str, scale: int | float, digits: int) -> dict[str, str]:
    rows = [row for row in summary.blocks if (row.what, row.group, row.block) == (what, group, block)]
    return {row.arm: cell(row.value, scale, digits) for row in rows}


def _block_panel(summary: Drifted, what: str, group: str, title: str, scale: float) -> Panel:
    rows = [row for row in summary.blocks if (row.what, row.group) == (what, group)]
    arms = list(dict.fromkeys(row.arm for row in rows))
    lines = []
    for place, arm in enumerate(arms):
        of_arm = [row for row in rows if row.arm == arm and row.value.value is not None]
        x = tuple(BLOCKS.index(row.block) + (place - (len(arms) - 1) / 2) * 0.3 / len(arms) for row in of_arm)
        lines.append(Series("line", all_scaled([row.value for row in of_arm], scale), x, label=arm))
    shown = [block for block in BLOCKS if any(row.block == block for row in rows)]
    return Panel(tuple(lines), title, Axis(ticks=tuple((float(BLOCKS.index(block)), block) for block in shown)))


def _distance_panel(summary: Drifted, header: Header) -> Panel:
    arms = list(dict.fromkeys(row.arm for row in summary.distances))
    bars = []
    for number, (group, _) in enumerate(GROUPS):
        rows = [row for row in summary.distances if row.group == group and row.kl.value is not None]
        y = tuple(arms.index(row.arm) + (number - 0.5) * 0.4 for row in rows)
        bars.append(Series("bar", tuple(row.kl for row in rows), y, label=group, horizontal=True))
    ticks = Axis(ticks=tuple((float(place), arm) for place, arm in enumerate(arms)), down=True)
    return Panel(tuple(bars), "KL(base || arm) after the statement (nats)", y=ticks)


register(Drift())
