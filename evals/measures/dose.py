"""Density by exposure at layers that are fixed beforehand, with its deviations of the null, and the verdict on "exposure makes density".

Everything is the winsorised effective rank at a name's last token, as an AUROC of two groups of names, averaged over a third of the layers. The
rule is in `probes/verdict.py`. Judged are the bases of worlds whose exposures are drawn at random, beside their untrained twins, and arms that a
lesson was taught to, beside the arm that was taught other names. Not judged: names of other origin, such as the cities', whose exposure nobody
drew.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from evals.display.cells import Columns, Table, cell, over, table
from evals.measures.controls import is_control
from evals.measures.separation import CHANGE_SITES, SIGNS, UNTRAINED, Seed, compared, contributions, drawn, seeds_of, states_of, step_of, trend
from evals.measures.verdicts import beyond_shuffled, clause, clause_beside, tuning_runs
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import intervals
from evals.statistics.judged import Verdict, judged
from evals.statistics.power import Needs
from evals.statistics.value import Value, finite, value_of
from evals.study import Study
from probes.internals.blocks import thirds
from probes.separation import permuted
from probes.verdict import EXPOSURE_RULE, FAMILY, LAYERS_OF_EXPOSURE, NAMES_RULE, Clause, measured, verdict
from proxytune.errors import UserError

CLAIMS = {
    "residual": "exposure makes names denser in the residual stream",
    "neurons": "exposure makes names sparser in the MLP's neurons",
}
EROSION = "direct tuning erodes density at names"
# The clauses, and their columns.
CLAUSES = {"dose": "dose", "trend": "trend", "dose/beside": "beside"}
CHANGES = {"seen": "change", "seen/shuffled": "beyond shuffled answers"}
OTHERS = "others"  # the lesson about other names


@dataclass(frozen=True)
class BlockSeparated:
    """AUROC of two groups, mean over the layers of a block. `null_sd`: its standard deviation when the groups' names are shuffled."""

    world: str | None
    arm: str
    groups: str
    site: str
    block: str
    auroc: Value
    null_sd: float | None

    @property
    def deviations(self) -> float | None:
        """How many null deviations the AUROC is from .5."""
        return None if self.auroc.value is None or not self.null_sd else (self.auroc.value - 0.5) / self.null_sd


def in_blocks(records: Recorded) -> Iterator[BlockSeparated]:
    """Of every arm, and of the base's untrained twin."""
    base = records.study.base_arm
    sources = [*((arm, arm, "spread") for arm in records.arms("spread")), (UNTRAINED, base, "spread_untrained")]
    for (world, part), (label, arm, frame) in product(records.by_world(), sources):
        seeds = seeds_of(part, arm, frame)
        for groups, site in product(compared(seeds), CHANGE_SITES):
            found = [contributions(seed, *groups, site) for seed in seeds]
            null = [_null(seed, *groups, site) for seed in seeds]
            states = states_of(seeds[0], site)
            for block, layers in thirds(int(states.max())).items():
                inside = np.isin(states, layers)
                if inside.any():
                    (value,) = intervals(part.estimate([each[:, inside].mean(axis=1, keepdims=True) for each in found]), (0.0, 1.0))
                    null_sd = finite(float(np.mean([each[:, inside].mean(axis=1) for each in null], axis=0).std()))
                    yield BlockSeparated(world, label, "/".join(groups), site, block, value_of(value), null_sd)


def _null(seed: Seed, first: str, second: str, site: str) -> np.ndarray:
    contrast = seed.contrast(first, second)
    return permuted(seed.at_names(site).values, contrast, seed.strata, drawn(contrast, seed.strata).permutations)


# The verdicts


def separation_of(records: Recorded, arm: str, site: str, block: str, frame: str = "spread") -> list[np.ndarray]:
    """For each seed, units' contributions [units, 1] to the AUROC of the most familiar group against the least, from .5, times the predicted sign."""
    return [SIGNS[site] * (_of_block(seed, site, block) - 0.5) for seed in seeds_of(records, arm, frame)]


def separation_change(records: Recorded, arm: str, site: str, block: str) -> list[np.ndarray]:
    """The same, arm minus base."""
    pairs = zip(separation_of(records, arm, site, block), separation_of(records, records.study.base_arm, site, block), strict=True)
    return [one - other for one, other in pairs]


def _of_block(seed: Seed, site: str, block: str) -> np.ndarray:
    states = states_of(seed, site)
    inside = np.isin(states, thirds(int(states.max()))[block])
    return contributions(seed, *compared([seed])[0], site)[:, inside].mean(axis=1, keepdims=True)


def exposure_verdicts(records: Recorded) -> Iterator[Verdict]:
    """Of every world's base, and of every arm that a lesson was taught to."""
    study = records.study
    lessons = {label: study.lesson_of(setting.arm) for label, setting in study.rows.items()}
    others = next((label for label, facts in lessons.items() if facts == OTHERS), None)
    for (world, part), site in product(records.by_world(), CLAIMS):
        if world is not None and part.has("spread", study.base_arm):
            name = world if len(study.worlds) > 1 else study.base_arm
            yield _judge(part, study.base_arm, f"{name}, {site}", site, (study.base_arm, "spread_untrained", "an untrained twin"))
        for arm in part.arms("spread"):
            if lessons.get(arm) not in (None, OTHERS):
                beside = None if others is None else (others, "spread", f"{others}, which was taught other names")
                yield _judge(part, arm, f"{arm}, {site}", site, beside)


def names_verdicts(records: Recorded) -> Iterator[Verdict]:
    """Whether tuning erodes density at names: of every tuned arm but the controls, at the sites where the base shows it, by world."""
    study = records.study
    for (world, part), site in product(records.by_world(), CLAIMS):
        block = LAYERS_OF_EXPOSURE[site]
        arms = [arm for arm in part.arms("spread") if _is_tuned(study, arm)]
        seen = intervals(part.estimate(separation_of(part, study.base_arm, site, block)))[0] if arms else None
        for arm in arms if seen is not None and seen.low > 0 else ():
            clauses = changed_clauses(part, ("seen", "seen/shuffled"), arm, site, block, tuning_runs(part, arm, "spread"))
            name = f"{arm}, {site}" if world is None or len(study.worlds) == 1 else f"{arm}, {site}, {world}"
            yield Verdict(name, EROSION, verdict(clauses, NAMES_RULE), judged(clauses))


def changed_clauses(records: Recorded, names: tuple[str, str], arm: str, site: str, block: str, runs: int) -> list[Clause]:
    """Two clauses: what tuning changed of the separation, and that beyond tuning on shuffled answers."""

    def change(label: str) -> list[np.ndarray]:
        return separation_change(records, label, site, block)

    seeds = change(arm)
    return [clause(records, names[0], seeds, 0, None, runs), beyond_shuffled(records, names[1], arm, seeds, change, runs)]


def _is_tuned(study: Study, arm: str) -> bool:
    """Whether the arm was tuned on the study's items, or elsewhere: no lesson, no checkpoint of pretraining, no control."""
    if arm == study.base_arm or arm not in study.rows:
        return False
    return study.lesson_of(study.rows[arm].arm) is None and step_of(arm) is None and not is_control(study, arm)


def _judge(records: Recorded, arm: str, name: str, site: str, beside: tuple[str, str, str] | None) -> Verdict:
    block, runs = LAYERS_OF_EXPOSURE[site], tuning_runs(records, arm, "spread")
    dose = separation_of(records, arm, site, block)
    clauses = [clause(records, "dose", dose, 0, None, runs), _trend(records, arm, site, block, runs)]
    others, note = None, "no arm was taught other names"
    if beside is not None:
        label, frame, words = beside
        others, note = separation_of(records, label, site, block, frame), f"minus {words}"
    clauses.append(clause_beside(records, "dose/beside", dose, others, runs, note))
    return Verdict(name, CLAIMS[site], verdict(clauses, EXPOSURE_RULE), judged(clauses))


def _trend(records: Recorded, arm: str, site: str, block: str, runs: int) -> Clause:
    try:
        found = [SIGNS[site] * trend(seed, site, block) for seed in seeds_of(records, arm, "spread")]
    except UserError:  # nothing of the exposure is left within strata
        return measured("trend", None, runs, note="exposure does not vary among names of one length")
    return clause(records, "trend", found, 0, None, runs)


# What is shown


def block_table(rows: Sequence[BlockSeparated], header: Header) -> list[Table]:
    """The dose of taught names by arm: at the layers by which exposure is judged."""
    least = rows[0].groups.split("/")[1] if rows else ""
    rows = [row for row in rows if row.groups.split("/")[1] == least]
    columns: Columns = {level.split("/")[0]: {} for level in reversed(dict.fromkeys(row.groups for row in rows))}
    for row in rows:
        if LAYERS_OF_EXPOSURE.get(row.site) == row.block:
            deviations = "" if row.deviations is None else f" ({row.deviations:+.1f})"
            columns[row.groups.split("/")[0]][f"{row.arm}: {row.site}, {row.block} layers"] = f"{cell(row.auroc, 1, 2)}{deviations}"
    note = (
        f"AUROC of names that were taught so often against names that were taught {least} times: winsorised effective rank at the name's last token, "
        "mean over a third of the layers that was fixed beforehand. In parentheses: how many null deviations from .5. Predicted: residual above .5, "
        f"neurons below. 95 % intervals, {over(len(header.seeds))}."
    )
    names = dict.fromkeys(name for cells in columns.values() for name in cells)
    ordered = sorted(names, key=lambda name: name.rpartition(": ")[2], reverse=True)
    return table("Density at taught names by exposure (AUROC)", ordered, columns, note, first="arm and site")


def exposure_table(rows: Sequence[Verdict], header: Header) -> list[Table]:
    """All verdicts, with the clauses that make them and what would have refuted them."""
    counts = {name: EXPOSURE_RULE[name].threshold for name in CLAUSES}
    beside = dict.fromkeys(one.note for row in rows for one in row.clauses if one.clause == "dose/beside" and one.value.value is not None)
    claims = "; ".join(dict.fromkeys(row.claim for row in rows))
    note = (
        f"Claims: {claims}. All numbers are times the predicted sign, so that the claim is above 0. Dose: AUROC from .5 of the most exposed names "
        f"against those never stated; it counts from {counts['dose']:g}. Trend: rank correlation of density with exposure; it counts from "
        f"{counts['trend']:g}. Beside: the dose {', or '.join(beside) or 'beside a model without the exposure'}; it counts from "
        f"{counts['dose/beside']:g}. A clause holds if its whole interval is above 0. It fails, and the claim with it, if an effect that counts is "
        f"rejected (one-sided, corrected by Holm for the clauses, at {FAMILY:g}). The claim is supported if all clauses hold. Layers are fixed "
        f"beforehand: {_layers()}. Needed: the seeds that would decide "
        f"the clauses that cannot tell. 95 % intervals, {over(len(header.seeds))}."
    )
    return table("Does exposure make density at names?", [row.arm for row in rows], _columns(rows, CLAUSES, 2), note, first="where")


def names_table(rows: Sequence[Verdict], header: Header) -> list[Table]:
    """All verdicts on erosion at names."""
    note = (
        f"Claim: {EROSION}. Change: of the distance of the AUROC from .5, of the most familiar names against the least, arm minus base, in the "
        f"predicted direction, so that erosion is below 0; it counts from {NAMES_RULE['seen'].threshold:g}. Judged where the base shows it, by "
        f"layers that are fixed beforehand ({_layers()}); other sites are left out. Rules as for exposure. 95 % intervals, {over(len(header.seeds))}."
    )
    return table("Does tuning erode density at names?", [row.arm for row in rows], _columns(rows, CHANGES, 3), note, first="arm and site")


def _columns(rows: Sequence[Verdict], clauses: Mapping[str, str], digits: int) -> Columns:
    """The verdicts, a column for each of `clauses` (its heading by its name) with value and state, and the seeds needed; none that is empty."""
    columns: Columns = {"verdict": {row.arm: row.verdict for row in rows}}
    for name, heading in clauses.items():
        of_name = {row.arm: one for row in rows for one in row.clauses if one.clause == name}
        columns[heading] = {
            arm: one.note if one.value.value is None else f"{cell(one.value, 1, digits)}: {one.state}" for arm, one in of_name.items()
        }
    columns["needed"] = {row.arm: _needed(row) for row in rows}
    return {name: cells for name, cells in columns.items() if any(cells.values())}


def _layers() -> str:
    return ", ".join(f"{site}, the {block} third" for site, block in LAYERS_OF_EXPOSURE.items())


def _needed(row: Verdict) -> str:
    open_ = [one.needs for one in row.clauses if one.state == "cannot tell" and one.needs is not None]
    return str(Needs(max(open_), "seeds")) if open_ else ""
