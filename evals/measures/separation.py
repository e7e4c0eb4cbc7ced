"""What density says of names: how well it tells familiar from unfamiliar ones (AUROC with sign), and how tuning changes that.

Mathematics: `probes/separation.py`. The signs are predicted, after a pilot on other models' names and before any run of this code: at the entity's
last token familiar names are denser in the winsorised residual stream (`SIGNS`: above .5) and sparser in the MLP's neurons (below .5).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
import pandas as pd

from evals.display.cells import Columns, Table, cell, over, table
from evals.display.chart import Axis, Chart, Panel, Series
from evals.measures.long import matrix
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import by_unit, intervals
from evals.statistics.value import UNKNOWN, Value, finite, value_of, values_of
from probes.internals.blocks import thirds
from probes.knowledge.exposure import rank_correlation
from probes.separation import Pairs, alike, auroc, extremes, halves, held_out, in_halves, pairs_of, permuted, shuffled, wins
from proxytune.errors import UserError

UNTRAINED = "untrained"
SPREADS = (("effective_rank", "winsorised"), ("effective_rank", "raw"), ("participation_ratio", "winsorised"), ("norm", "raw"))
OF_TUNED = SPREADS[:2]  # what a tuned model's rows have
SIGNS = {"residual": 1, "neurons": -1}  # predicted for the winsorised ones: denser, sparser
FEW_LEVELS = 2  # of more levels than these, a table and a figure of their own show the dose
DOSES = {
    ("neurons", "effective_rank", True, "entity"): "neurons, effective rank, at the name",
    ("neurons", "effective_rank", True, "last"): "neurons, effective rank, at the end",
    ("neurons", "norm", False, "entity"): "neurons, norm, at the name",
    ("residual", "effective_rank", True, "entity"): "residual, effective rank, at the name",
}
CHANGE_SITES = ("residual", "attention", "mlp", "neurons")


@dataclass(frozen=True)
class Separated:
    """AUROC of the first group against the second, at the layer that held-out entities choose. `low` and `high`: 95 % interval.

    `null_low` and `null_high`: between these are 95 % of the AUROCs of the best layer when the groups' names are shuffled. `given_surprisal`: among
    names of like log-probability and token frequency, with its interval. `opposite`: the same AUROC where the layer is chosen against the predicted
    sign; a prediction that holds in one layer is worth less where another layer shows the reverse. None where it could not be computed, or where no
    sign is predicted. `arm` may also be `untrained`.
    """

    world: str | None
    arm: str
    groups: str
    site: str
    winsorised: bool
    place: str
    metric: str
    layer: int
    auroc: float | None
    low: float | None
    high: float | None
    null_low: float | None
    null_high: float | None
    given_surprisal: float | None
    given_low: float | None
    given_high: float | None
    opposite: float | None

    @property
    def first(self) -> str:
        return self.groups.split("/")[0]

    @property
    def least(self) -> str:
        """The less familiar one of the groups."""
        return self.groups.split("/")[1]

    @property
    def of_winsorised_rank(self) -> bool:
        return self.metric == "effective_rank" and self.winsorised


@dataclass(frozen=True)
class LayerSeparated:
    """AUROC of winsorised effective rank at the entity's last token after one layer, not held out; the groups are the first and the last."""

    world: str | None
    arm: str
    groups: str
    site: str
    state: int
    auroc: Value


@dataclass(frozen=True)
class Graded:
    """Rank correlation of winsorised effective rank at the entity's last token with popularity (in a world: exposure), over all groups: its mean over
    the middle third of the layers, which is fixed beforehand. `partial`: controlled for the name's log-probability and token frequency."""

    world: str | None
    arm: str
    site: str
    correlation: Value
    partial: Value


@dataclass(frozen=True)
class SeparationChange:
    """AUROC (winsorised effective rank, entity's last token), arm minus base, paired over entities: its mean over the layers of a block."""

    arm: str
    groups: str
    site: str
    block: str
    change: Value


class Seed(NamedTuple):
    """One seed's entities and values, with one column for each quantity."""

    names: pd.DataFrame
    values: np.ndarray
    columns: pd.DataFrame

    def of(self, **wanted: str) -> "Seed":
        """The columns with these names."""
        chosen = np.all([self.columns[name] == value for name, value in wanted.items()], axis=0)
        return self._replace(values=self.values[:, chosen], columns=self.columns[chosen].reset_index(drop=True))

    @property
    def states(self) -> np.ndarray:
        return self.columns["state"].to_numpy()

    @property
    def strata(self) -> np.ndarray:
        return self.names["length"].to_numpy()

    @property
    def covariates(self) -> np.ndarray:
        return self.names[["log_probability", "frequency"]].to_numpy(float)

    def at_names(self, site: str) -> "Seed":
        """Winsorised effective rank at the names' last tokens, one column for each state."""
        return self.of(metric="effective_rank", cut="winsorised", site=site, place="entity")

    def contrast(self, first: str, second: str) -> np.ndarray:
        return (self.names["group"] == first).to_numpy(int) - (self.names["group"] == second).to_numpy(int)


class _Comparison(NamedTuple):
    """Two groups of one seed: what every quantity shares."""

    contrast: np.ndarray
    pairs: Pairs
    alike: Pairs
    halves: np.ndarray
    permutations: np.ndarray


class _Found(NamedTuple):
    """Of one site and place: units' contributions to the held-out AUROC and to that given surprisal, the chosen state, and the null's draws."""

    auroc: np.ndarray
    given: np.ndarray
    state: int
    null: np.ndarray
    opposite: float


Where = tuple[str, str]  # a site and a place
Quantity = tuple[str, str, bool, str, str]  # groups, site, winsorised, place and metric


def separated(records: Recorded) -> tuple[Separated, ...]:
    base = records.study.base_arm
    others = [arm for arm in records.arms("spread") if arm != base]
    sources = [(base, base, "spread", SPREADS), *((arm, arm, "spread", OF_TUNED) for arm in others), (UNTRAINED, base, "spread_untrained", SPREADS)]
    return tuple(row for world, part in records.by_world() for source in sources for row in _separated(part, world, *source))


def _separated(records: Recorded, world: str | None, label: str, arm: str, frame: str, spreads: Sequence[tuple[str, str]]) -> Iterator[Separated]:
    seeds = seeds_of(records, arm, frame)
    found = [_find_all(seed, spreads) for seed in seeds]
    both = [np.stack([part for one in of.values() for part in (one.auroc, one.given)], axis=1) for of in found]
    values = values_of(intervals(records.estimate(both), (0.0, 1.0))) if found else []
    for place, (names, value, given) in enumerate(zip(found[0] if found else (), values[::2], values[1::2], strict=True)):
        of_seeds = [list(of.values())[place] for of in found]
        states = [one.state for one in of_seeds]
        null = [finite(end) for end in np.quantile(np.mean([one.null for one in of_seeds], axis=0), [0.025, 0.975])]
        opposite = finite(float(np.mean([one.opposite for one in of_seeds])))
        numbers = (value.value, value.low, value.high, *null, given.value, given.low, given.high, opposite)
        yield Separated(world, label, *names, max(set(states), key=states.count), *numbers)


def _find_all(seed: Seed, spreads: Sequence[tuple[str, str]]) -> dict[Quantity, _Found]:
    """Every metric at every site and place, of all groups that are compared."""
    found: dict[Quantity, _Found] = {}
    for groups in compared([seed]):
        comparison = _comparison(seed, *groups)
        for metric, cut in spreads:
            of_places = _find(seed.of(metric=metric, cut=cut), comparison, cut == "winsorised")
            found |= {("/".join(groups), site, cut == "winsorised", place, metric): one for (site, place), one in of_places.items()}
    return found


def _find(seed: Seed, of: _Comparison, winsorised: bool) -> dict[Where, _Found]:
    """One metric at every site and place."""
    won, like = wins(seed.values, of.pairs), wins(seed.values, of.alike)
    in_all, in_alike = in_halves(won, of.pairs, of.halves), in_halves(like, of.alike, of.halves)
    null = permuted(seed.values, of.contrast, seed.strata, of.permutations)
    found = {}
    for (site, place), part in seed.columns.groupby(["site", "place"], observed=True, sort=False):
        layers = part.index.to_numpy()
        predicted = SIGNS.get(str(site), 0) if winsorised else 0
        held = held_out(in_all[..., layers], in_all[..., layers], predicted)
        given = held_out(in_all[..., layers], in_alike[..., layers], predicted)
        chosen = layers[held.layer]
        of_units = [
            _around(by_unit(seed.names, auroc(of_pairs[:, [chosen]], pairs))[:, 0], value)
            for of_pairs, pairs, value in ((won, of.pairs, held.value), (like, of.alike, given.value))
        ]
        against = held_out(in_all[..., layers], in_all[..., layers], -predicted).value if predicted else np.nan
        found[str(site), str(place)] = _Found(of_units[0], of_units[1], int(seed.states[chosen]), extremes(null[:, layers]), against)
    return found


def _around(contributions: np.ndarray, value: float) -> np.ndarray:
    """The contributions with another mean: the spread of the layer that was chosen most often, around the held-out value."""
    return np.asarray(contributions - contributions.mean() + value)


def _comparison(seed: Seed, first: str, second: str) -> _Comparison:
    contrast, strata = seed.contrast(first, second), seed.strata
    shared = drawn(contrast, strata)
    others = pairs_of(contrast, alike(contrast, strata, seed.covariates))
    return _Comparison(contrast, shared.pairs, others, shared.halves, shared.permutations)


class _Drawn(NamedTuple):
    """What two groups of names share in all models that read them."""

    pairs: Pairs
    halves: np.ndarray
    permutations: np.ndarray


def drawn(contrast: np.ndarray, strata: np.ndarray) -> _Drawn:
    """The same for every arm of a seed, so that it is kept."""
    return _drawn_of(contrast.astype(np.int64).tobytes(), strata.astype(np.int64).tobytes())


@lru_cache(maxsize=128)
def _drawn_of(contrast: bytes, strata: bytes) -> _Drawn:
    groups, lengths = (np.frombuffer(each, np.int64) for each in (contrast, strata))
    return _Drawn(pairs_of(groups, lengths), halves(groups, lengths), shuffled(groups, lengths))


def compared(seeds: Sequence[Seed]) -> list[tuple[str, str]]:
    """The pairs of groups that are compared: the most familiar against the least first; all of three groups, of more each against the least."""
    if not seeds:
        return []
    groups = list(dict.fromkeys(seeds[0].names["group"]))
    pairs = list(combinations(groups, 2)) if len(groups) <= 3 else [(group, groups[-1]) for group in groups[:-1]]
    return sorted(pairs, key=lambda pair: pair[1] != groups[-1])


def seeds_of(records: Recorded, arm: str, frame: str) -> list[Seed]:
    return [Seed(names, *matrix(spread, len(names))) for names, spread in zip(records("names", arm), records(frame, arm), strict=True)]


def by_layer(records: Recorded) -> Iterator[LayerSeparated]:
    base = records.study.base_arm
    for (world, part), (label, frame) in product(records.by_world(), ((base, "spread"), (UNTRAINED, "spread_untrained"))):
        seeds = seeds_of(part, base, frame)
        for groups in compared(seeds)[:1]:
            found = [np.hstack([contributions(seed, *groups, site) for site in SIGNS]) for seed in seeds]
            names = [(site, int(state)) for site in SIGNS for state in states_of(seeds[0], site)]
            for (site, state), value in zip(names, values_of(intervals(part.estimate(found), (0.0, 1.0))), strict=True):
                yield LayerSeparated(world, label, "/".join(groups), site, state, value)


def states_of(seed: Seed, site: str) -> np.ndarray:
    """The states that a site has: layers from 1, and of the residual stream also the embeddings, 0."""
    return seed.at_names(site).states


def contributions(seed: Seed, first: str, second: str, site: str) -> np.ndarray:
    """Units' contributions to the AUROC of every layer."""
    pairs = drawn(seed.contrast(first, second), seed.strata).pairs
    return by_unit(seed.names, auroc(wins(seed.at_names(site).values, pairs), pairs))


def graded(records: Recorded) -> Iterator[Graded]:
    base = records.study.base_arm
    sources = [*((arm, arm, "spread") for arm in records.arms("spread")), (UNTRAINED, base, "spread_untrained")]
    for (world, part), (label, arm, frame) in product(records.by_world(), sources):
        seeds = seeds_of(part, arm, frame)
        for site in SIGNS if seeds else ():
            yield Graded(world, label, site, *(_correlation(part, seeds, site, given) for given in (False, True)))


def _correlation(records: Recorded, seeds: Sequence[Seed], site: str, given: bool) -> Value:
    try:
        return value_of(intervals(records.estimate([trend(seed, site, "middle", given) for seed in seeds]))[0])
    except UserError:  # nothing of the popularity is left within strata
        return UNKNOWN


def trend(seed: Seed, site: str, block: str, given: bool = False) -> np.ndarray:
    """Units' contributions [units, 1] to the rank correlation with popularity, averaged over a block's layers; `given` the covariates if so asked.

    Raises `UserError` where nothing of the popularity is left within strata.
    """
    part = seed.at_names(site)
    inside = np.isin(part.states, thirds(int(part.states.max()))[block] or part.states.max())
    popularity = seed.names["popularity"].to_numpy(float)
    of_layers = rank_correlation(part.values[:, inside], popularity, seed.strata, seed.covariates if given else None)
    return by_unit(seed.names, of_layers.mean(axis=1, keepdims=True))


def changed(records: Recorded) -> Iterator[SeparationChange]:
    base = records.study.base_arm
    before = seeds_of(records, base, "spread")
    for arm in records.arms("spread"):
        if arm == base:
            continue
        of_seeds = [_block_changes(*pair) for pair in zip(before, seeds_of(records, arm, "spread"), strict=True)]
        values = values_of(intervals(records.estimate([np.stack(list(of.values()), axis=1) for of in of_seeds])))
        for names, change in zip(of_seeds[0], values, strict=True):
            yield SeparationChange(arm, *names, change)


def _block_changes(before: Seed, after: Seed) -> dict[tuple[str, str, str], np.ndarray]:
    """By groups, site and block: units' contributions to the change of the AUROC, averaged over the block's layers."""
    found = {}
    for groups in compared([before]):
        for site in CHANGE_SITES:
            states = states_of(before, site)
            old, new = (contributions(seed, *groups, site) for seed in (before, after))
            for block, layers in thirds(int(states.max())).items():
                if len(layers):
                    inside = np.isin(states, layers)
                    found["/".join(groups), site, block] = (new - old)[:, inside].mean(axis=1)
    return found


# What is shown


def separation_table(rows: Sequence[Separated], graded: Sequence[Graded], header: Header) -> list[Table]:
    """Of the base, with the untrained twin beside it; where there are many levels of exposure, the highest against the lowest."""
    several = len(_levels(rows)) > FEW_LEVELS
    shown = [row for row in rows if row.place == "entity" and _is_shown(row, rows[0].groups) and not (several and row.groups != rows[0].groups)]
    of_base = {_measure(row): row for row in shown if row.arm == header.base}
    columns: Columns = {
        "AUROC": {name: cell(Value(row.auroc, row.low, row.high), 1, 2) for name, row in of_base.items()},
        "null": {name: f"{row.null_low:.2f} to {row.null_high:.2f}" for name, row in of_base.items()},
        "predicted": {name: _predicted(row) for name, row in of_base.items()},
        "given surprisal": {name: cell(Value(row.given_surprisal, row.given_low, row.given_high), 1, 2) for name, row in of_base.items()},
        "against": {name: cell(Value(row.opposite), 1, 2) for name, row in of_base.items() if row.opposite is not None},
        "layer": {name: str(row.layer) for name, row in of_base.items()},
        "untrained": {_measure(row): cell(Value(row.auroc), 1, 2) for row in shown if row.arm == UNTRAINED},
    }
    correlations = "; ".join(
        f"{one.site} of {one.arm} {cell(one.correlation, 1, 2)}, given surprisal {cell(one.partial, 1, 2)}"
        for one in graded
        if one.arm in (header.base, UNTRAINED) and len(header.worlds) < 2
    )
    note = (
        "AUROC: the probability that a name of the first group has the larger effective rank (is denser; norm: is longer); .5 is nothing. The "
        "layer is chosen on one half of the names (by the predicted sign, where there is one) and scored on the other. Null: 95 % of the AUROCs "
        "of the best layer when the groups' names are shuffled. Given surprisal: among names of like log-probability and token frequency. Names "
        "are compared at equal lengths in tokens. Winsorised: the largest 1 % of the coordinates are cut. Against: the same where the layer is "
        "chosen against the predicted sign. Other sites, and the sentence's last token, are in results.json. 95 % "
        f"intervals, {over(len(header.seeds))}."
    )
    if correlations:
        note += f" Rank correlation of winsorised effective rank with popularity or exposure, mean over the middle layers: {correlations}."
    return table("Density of familiar and unfamiliar names, at the name's last token (AUROC)", of_base, columns, note, first="groups and site")


def _is_shown(row: Separated, first: str) -> bool:
    """What was predicted, for all groups; of the first also what it is to be told from."""
    if row.of_winsorised_rank:
        return row.site in SIGNS or (row.groups, row.site) == (first, "rotated")
    return row.groups == first and row.site in SIGNS and row.metric != "participation_ratio"


def _measure(row: Separated) -> str:
    world = "" if row.world is None else f"{row.world}: "
    return f"{world}{row.groups}, {row.site} {'norm' if row.metric == 'norm' else 'winsorised' if row.winsorised else 'raw'}"


def _in_world(world: str | None, header: Header) -> str:
    """The world's name before what is said of it, where there is more than one."""
    return f"{world}: " if len(header.worlds) > 1 else ""


def _levels(rows: Sequence[Separated]) -> list[str]:
    """The groups that are compared with the least familiar one, the least first."""
    return list(dict.fromkeys(row.first for row in reversed(rows) if row.least == rows[0].least))


def dose_table(rows: Sequence[Separated], header: Header) -> list[Table]:
    """AUROC by exposure, where there are many levels of it."""
    levels = _levels(rows)
    if len(levels) <= FEW_LEVELS:
        return []
    least = rows[0].least
    columns: Columns = {}
    for row in rows:
        shown = DOSES.get((row.site, row.metric, row.winsorised, row.place))
        if shown is not None and (row.arm == header.base or (row.arm == UNTRAINED and shown == next(iter(DOSES.values())))):
            place = f"{_in_world(row.world, header)}{shown}{'' if row.arm == header.base else ', untrained'}"
            columns.setdefault(row.first, {})[place] = cell(Value(row.auroc, row.low, row.high), 1, 2)
    columns = {level: columns[level] for level in levels}
    note = (
        f"The probability that a name that was stated so often has the larger value than one of exposure {least}; .5 is nothing. Effective rank is "
        f"winsorised. At the layer that held-out names choose for each level. 95 % intervals, {over(len(header.seeds))}."
    )
    return table(f"Density at names by exposure (AUROC against exposure {least})", columns[levels[-1]], columns, note, first="where")


def _predicted(row: Separated) -> str:
    """Whether the sign that was predicted is there, beyond the null."""
    sign = SIGNS.get(row.site)
    if sign is None or not row.of_winsorised_rank or row.place != "entity" or row.auroc is None:
        return ""
    assert row.null_low is not None and row.null_high is not None
    if row.null_low <= row.auroc <= row.null_high:
        return f"{'above' if sign > 0 else 'below'} .5: within the null"
    if (row.auroc > 0.5) != (sign > 0):
        return f"{'above' if sign > 0 else 'below'} .5: no, reversed"
    reverse = row.opposite is not None and not row.null_low <= row.opposite <= row.null_high and (row.opposite > 0.5) != (sign > 0)
    return f"{'above' if sign > 0 else 'below'} .5: yes{'; reversed in other layers' if reverse else ''}"


def change_table(rows: Sequence[SeparationChange], header: Header, unchanged: str) -> list[Table]:
    groups = [row.groups for row in rows][:1]
    columns: Columns = {
        f"{site}, {block}": {row.arm: cell(row.change, 1, 3) for row in rows if (row.site, row.block, row.groups) == (site, block, *groups)}
        for site in SIGNS
        for block in ("low", "middle", "high")
    }
    columns = {name: cells for name, cells in columns.items() if cells}
    if not columns:
        return []
    next(iter(columns.values())).update(dict.fromkeys(header.proxied, unchanged))
    note = (
        f"AUROC of {groups[0]} (winsorised effective rank, name's last token), arm minus base, paired over names; mean over the layers of a block. "
        "Where the base's own is above .5, a fall is erosion; where it is below .5 (neurons, as predicted), a rise is. "
        f"95 % intervals, {over(header.runs)}."
    )
    arms = header.ordered([*header.proxied, *(row.arm for row in rows)])
    return table("Erosion: change of the AUROC of familiar against unfamiliar names", arms, columns, note)


def layer_chart(rows: Sequence[LayerSeparated], bands: Sequence[Separated], header: Header) -> Iterable[Chart]:
    """AUROC by layer, base and untrained twin, with the null band of the base's best layer."""
    if not rows:
        return
    panels = []
    for world, site in product(dict.fromkeys(row.world for row in rows), SIGNS):
        marks = []
        for arm, label in ((header.base, "base"), (UNTRAINED, UNTRAINED)):
            chosen = [row for row in rows if (row.world, row.arm, row.site) == (world, arm, site)]
            marks.append(Series("band", tuple(row.auroc for row in chosen), tuple(float(row.state) for row in chosen), label=label))
        band = next(
            row
            for row in bands
            if row.of_winsorised_rank
            and (row.world, row.arm, row.groups, row.site, row.place) == (world, header.base, rows[0].groups, site, "entity")
        )
        levels = tuple(Series("level", (Value(end),)) for end in (band.null_low, band.null_high))
        title = f"{_in_world(world, header)}{site}: predicted {'above' if SIGNS[site] > 0 else 'below'} .5"
        panels.append(Panel((*marks, *levels), title, Axis("layer", integers=True), Axis(f"AUROC, {rows[0].groups}", limits=(0.0, 1.0))))
    note = "winsorised effective rank at the name's last token; dotted: 95 % of the best layer's when the groups' names are shuffled"
    yield Chart("density-names", f"{header.title}: density of familiar against unfamiliar names", tuple(panels), note, across=2)


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name: step-100, step1000-tokens4B, checkpoint-500; None if there is none."""
    found = re.search(r"(?:step|checkpoint)[-_]?(\d+)", name)
    return None if found is None else int(found[1])


def emergence_chart(rows: Sequence[Separated], header: Header) -> Iterable[Chart]:
    """AUROC by step of pretraining, a line for each group, where arms are checkpoints (see `step_of`)."""
    steps = {arm: step for arm in header.kinds if (step := step_of(arm)) is not None}
    if len(steps) < 2 or not rows:
        return
    arms = [*sorted(steps, key=steps.__getitem__), header.base]
    axis = Axis("step of pretraining", tuple((float(place), str(steps.get(arm, "end"))) for place, arm in enumerate(arms)))
    panels, least = [], rows[0].least
    predicted = [row for row in rows if row.of_winsorised_rank and row.place == "entity" and row.least == least]
    for world, site in product(dict.fromkeys(row.world for row in rows), SIGNS):
        lines = []
        for level in reversed(_levels(rows)):
            found = {row.arm: row for row in predicted if (row.world, row.site, row.first) == (world, site, level)}
            values = tuple(Value(found[arm].auroc, found[arm].low, found[arm].high) for arm in arms)
            lines.append(Series("line", values, tuple(float(place) for place in range(len(arms))), label=level))
        half = Series("level", (Value(0.5),))
        title = f"{_in_world(world, header)}{site}"
        panels.append(Panel((*lines, half), title, axis, Axis(f"AUROC against {least}", limits=(0.0, 1.0))))
    note = "winsorised effective rank at the name's last token, at the layer that held-out names choose; end: the base itself"
    yield Chart("density-emergence", f"{header.title}: density at names during pretraining", tuple(panels), note, across=2)
