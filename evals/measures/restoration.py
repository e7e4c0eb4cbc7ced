"""Restoration: what returns when parts of a tuned model are set back to the base. Mathematics: `probes/restoration.py`, `probes/patching.py`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from evals.display.cells import FEW_COLUMNS, Columns, Table, cell, over, table
from evals.display.chart import Axis, Chart, Panel, Series, all_scaled
from evals.measures.inputs import Inputs, as_content, common_columns
from evals.measures.measure import Frames, Measure, Progress, Reading, Settings
from evals.measures.registry import register
from evals.measures.subjects import Pair
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import exposed, intervals, means_by_unit
from evals.statistics.intervals import interval
from evals.statistics.value import Value, value_of, values_of
from probes.internals.blocks import BLOCKS
from probes.patching import patch_subject
from probes.restoration import block_label, count_evaluations, damage, recovery, restore, shapley

DRAWN = {
    "shapley": "Shapley value",
    "recovery": "restored alone",
    "same-number": "as many parameters elsewhere",
    "same-norm": "as much change elsewhere",
}


@dataclass(frozen=True)
class Restored(Reading):
    """The right candidate's probability with parts set back to the base, or with the base's state of the subject; and what restoring costs the task.

    Frames: `restoration` (one row per restored part and item), `restoration/task` (the same for task items, if there are any) and `patching`
    (one row per item and state, if every item names its subject).
    """

    name: str = "restoration"
    version: ClassVar[int] = 1
    subject: ClassVar[type[Pair]] = Pair

    def frames(self, subject: Pair, inputs: Inputs) -> tuple[str, ...]:
        if subject.tuned is None:
            return ()
        return ("restoration", *(["restoration/task"] if inputs.task else []), *(["patching"] if inputs.has_subjects else []))

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        return {"items": as_content(inputs.data.knowledge), "task": as_content(inputs.task), "prompt": inputs.data.prompt}

    def steps(self, subject: Pair, inputs: Inputs) -> int:
        return count_evaluations(subject.plan) + (len(BLOCKS) + 2 if inputs.task else 0)

    def read(self, subject: Pair, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        base, tuned, plan = subject.base, subject.tuned, subject.plan
        assert tuned is not None
        common = common_columns(inputs.data.knowledge)
        found = restore(base, tuned, plan, inputs.known_now, progress=progress)
        frames = [common.assign(restored=label, right=values.right, probability=values.probability) for label, values in found.items()]
        result = {"restoration": pd.concat(frames, ignore_index=True)}
        if inputs.task:
            single = {label: plan[label] for label in (block_label(blocks) for blocks in ((), *((block,) for block in BLOCKS), BLOCKS))}
            kept = restore(base, tuned, single, inputs.task_log_probability, progress=progress)
            of_task = common_columns(inputs.task)
            frames = [of_task.assign(restored=label, log_probability=values) for label, values in kept.items()]
            result["restoration/task"] = pd.concat(frames, ignore_index=True)
        if inputs.has_subjects:
            patched = patch_subject(base, tuned, inputs.data.knowledge, batch_size=inputs.study.batch_size)
            frames = [
                common.assign(base=patched.base, tuned=patched.tuned, state=state, share=patched.states[:, state])
                for state in range(patched.states.shape[1])
            ]
            result["patching"] = pd.concat(frames, ignore_index=True)
        return {subject.label: result}


@dataclass(frozen=True)
class Part:
    """What setting a part back to the base changes, in the right candidate's probability over exposed items.

    `what`: `loss` (base minus arm), `shapley`, `recovery` (the block alone), its controls `same-number` and `same-norm`, `damage` (the base with
    this block tuned), `top` and `random` (`part` per cent of all parameters), and `task` (nats per token of the task's answers).
    `share` is the value divided by the loss; None where the loss is within noise.
    """

    arm: str
    what: str
    part: str
    value: Value
    share: Value | None


@dataclass(frozen=True)
class Patched:
    """The right candidate's share with the base's state of the subject after layer `state`, minus the share without it. If `state` is None, the
    share of the base minus that of the arm."""

    arm: str
    state: int | None
    value: Value


@dataclass(frozen=True)
class RestorationFound:
    parts: tuple[Part, ...]
    patched: tuple[Patched, ...]


class Restoration(Measure[RestorationFound]):
    name = "restoration"
    question = "Which part of the weights holds what tuning lost?"
    controls = "As many parameters elsewhere; as much change elsewhere; random parameters; the cost to the task."
    needs = frozenset({"knowledge.statement", "knowledge.choices", "knowledge.popularity"})
    summary = RestorationFound

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        return [Restored()]

    def summarize(self, records: Recorded, settings: Settings) -> RestorationFound:
        return RestorationFound(
            tuple(part for arm in records.arms("restoration") for part in _parts(records, arm)),
            tuple(row for arm in records.arms("patching") for row in _patched(records, arm)),
        )

    def tables(self, summary: RestorationFound, header: Header) -> list[Table]:
        return [
            *_shapley_table(summary, header),
            *_block_table(summary, header),
            *_most_changed_table(summary, header),
            *_patching_table(summary, header),
        ]

    def charts(self, summary: RestorationFound, header: Header) -> Iterable[Chart]:
        found = {(row.arm, row.what, row.part): row.value for row in summary.parts if row.value.value is not None}
        panels = []
        for arm in _arms(summary, header):
            bars = []
            for number, (what, words) in enumerate(DRAWN.items()):
                places = [place for place, block in enumerate(BLOCKS) if (arm, what, block) in found]
                values = all_scaled([found[arm, what, BLOCKS[place]] for place in places], 100)
                bars.append(Series("bar", values, tuple(place + (number - 1.5) * 0.2 for place in places), label=words))
            lost = found.get((arm, "loss", "all"))
            title = arm if lost is None or lost.value is None else f"{arm}: {100 * lost.value:.1f} points lost"
            x = Axis(ticks=tuple((float(place), block) for place, block in enumerate(BLOCKS)))
            panels.append(Panel(tuple(bars), title, x, Axis("brought back (points of probability)"), zero=True))
        if panels:
            title = f"{header.title}: what restoring a block to the base brings back"
            note = "with 95 % intervals; controls stand beside what is restored alone"
            yield Chart("restoration", title, tuple(panels), note, paired=True, shared=True)


# What is concluded


def restored_by_seed(records: Recorded, arm: str) -> tuple[list[tuple[str, str]], list[np.ndarray]]:
    """The names of what was restored, and for each seed the units' changes of the right candidate's probability [units, parts], over exposed items.
    The whole loss is first."""
    names: list[tuple[str, str]] = []
    seeds = []
    for frame in records("restoration", arm):
        known = exposed(frame)
        values = {str(label): part["probability"].to_numpy(float) for label, part in known.groupby("restored", sort=False)}
        unchanged = values[block_label(())]
        columns = {("loss", "all"): values[block_label(BLOCKS)] - unchanged}
        for what, of_block in (("shapley", shapley), ("recovery", recovery), ("damage", damage)):
            columns |= {(what, block): gained for block, gained in of_block(values).items()}
        for label, value in values.items():
            kind, _, part = label.partition("/")
            if kind != "blocks":
                columns[kind, part] = value - unchanged
        # A control that one seed lacks (no match outside its block) is left out for all seeds.
        names = [name for name in names if name in columns] if names else list(columns)
        seeds.append((known[known["restored"] == block_label(())], columns))
    return names, [means_by_unit(frame, np.stack([columns[name] for name in names], axis=1)) for frame, columns in seeds]


def _parts(records: Recorded, arm: str) -> Iterator[Part]:
    names, seeds = restored_by_seed(records, arm)
    whole = records.estimate(seeds)
    values = intervals(whole)
    lost = values[0].excludes_zero()
    for position, ((what, part), value) in enumerate(zip(names, values, strict=True)):
        share = interval(whole.value[position] / whole.value[0], whole.draws[position] / whole.draws[0]) if lost else None
        yield Part(arm, what, part, value_of(value), None if share is None else value_of(share))
    yield from _task_parts(records, arm)


def _task_parts(records: Recorded, arm: str) -> Iterator[Part]:
    frames = records("restoration/task", arm)
    if not frames:
        return
    labels = {"all": block_label(BLOCKS), **{block: block_label((block,)) for block in BLOCKS}}
    seeds = []
    for frame in frames:
        values = {str(label): part["log_probability"].to_numpy(float) for label, part in frame.groupby("restored", sort=False)}
        unchanged = block_label(())
        columns = [values[label] - values[unchanged] for label in labels.values()]
        seeds.append(means_by_unit(frame[frame["restored"] == unchanged], np.stack(columns, axis=1)))
    for part, value in zip(labels, values_of(intervals(records.estimate(seeds))), strict=True):
        yield Part(arm, "task", part, value, None)


def _patched(records: Recorded, arm: str) -> Iterator[Patched]:
    seeds = []
    states: list[int] = []
    for frame in records("patching", arm):
        known = exposed(frame)
        known = known[known["tuned"].notna()]
        states = sorted(int(state) for state in known["state"].unique())
        parts = [known[known["state"] == state] for state in states]
        first = parts[0]
        columns = [*(part["share"].to_numpy(float) for part in parts), first["base"].to_numpy(float)]
        seeds.append(means_by_unit(first, np.stack(columns, axis=1) - first[["tuned"]].to_numpy(float)))
    for state, value in zip([*states, None], values_of(intervals(records.estimate(seeds))), strict=True):
        yield Patched(arm, state, value)


# What is shown


def _arms(summary: RestorationFound, header: Header) -> list[str]:
    return header.ordered(list(dict.fromkeys(row.arm for row in summary.parts)))


def _cells(summary: RestorationFound, what: str, part: str) -> dict[str, str]:
    return {row.arm: cell(row.value, 100) for row in summary.parts if (row.what, row.part) == (what, part)}


def _shapley_table(summary: RestorationFound, header: Header) -> list[Table]:
    columns: Columns = {"lost": _cells(summary, "loss", "all")}
    for block in BLOCKS:
        columns[block] = {row.arm: _with_share(row) for row in summary.parts if (row.what, row.part) == ("shapley", block)}
    note = (
        "Probability of the right candidate, exposed items. Lost: base minus arm. Each block's Shapley value: what setting it back to the base "
        "brings back, averaged over every order of the blocks. The values add up to the loss; per cent are of the loss (left out where "
        f"it is within noise). 95 % intervals, {over(header.runs)}."
    )
    return table("Restoration: which block holds the loss (points of probability)", _arms(summary, header), columns, note)


def _with_share(row: Part) -> str:
    share = "" if row.share is None or row.share.value is None else f", {row.share.value * 100:.0f} %"
    return cell(row.value, 100) + share


def _block_table(summary: RestorationFound, header: Header) -> list[Table]:
    """Each block by itself, beside its controls and its effect on the task."""
    found = {(row.arm, row.what, row.part): row.value for row in summary.parts}
    lines = [(arm, block) for arm in _arms(summary, header) for block in BLOCKS]
    frame = pd.DataFrame({"arm": [arm for arm, _ in lines], "block": [block for _, block in lines]}, dtype=str)
    for name, what in (("restored alone", "recovery"), ("as many elsewhere", "same-number"), ("as much change elsewhere", "same-norm")):
        frame[name] = [cell(found.get((arm, what, block)), 100) for arm, block in lines]
    frame["tuned alone"] = [cell(found.get((arm, "damage", block)), 100) for arm, block in lines]
    frame["task (nats a token)"] = [cell(found.get((arm, "task", block)), 1, 3) for arm, block in lines]
    note = (
        "Restored alone: what returns when this block is set back to the base, in points of the right candidate's probability. Its controls: as many "
        "parameters drawn outside it, and as much of the change's squared norm (n/a: nothing changed in it, or not enough outside); a block that "
        "brings back no more than its controls is not special. Tuned alone: what the base loses when only this block is tuned. Task: change of the "
        f"log-probability of the task's answers when the block is restored; below zero is a cost. 95 % intervals, {over(header.runs)}."
    )
    return [Table("Restoration, block by block (points of probability)", frame, note)] if lines else []


def _most_changed_table(summary: RestorationFound, header: Header) -> list[Table]:
    names = {"top": "changed most", "random": "at random"}
    found = {(row.arm, row.what, row.part): row.value for row in summary.parts if row.what in names}
    shares = sorted({part for _, _, part in found}, key=float)
    lines = [(arm, what) for arm in _arms(summary, header) for what in names if any(key[:2] == (arm, what) for key in found)]
    frame = pd.DataFrame({"arm": [arm for arm, _ in lines], "restored": [names[what] for _, what in lines]}, dtype=str)
    for share in shares:
        frame[f"{share} %"] = [cell(found.get((arm, what, share)), 100) for arm, what in lines]
    note = f"The parameters that changed most, and as many random ones, set back to the base. 95 % intervals, {over(header.runs)}."
    return [Table("Restoration of a share of all parameters (points of probability brought back)", frame, note)] if lines else []


def _patching_table(summary: RestorationFound, header: Header) -> list[Table]:
    rows = summary.patched
    arms = header.ordered(list(dict.fromkeys(row.arm for row in rows)))
    states = sorted({row.state for row in rows if row.state is not None})
    columns: Columns = {"lost": {row.arm: cell(row.value, 100) for row in rows if row.state is None}}
    note = "Lost: base minus arm in the right candidate's share. "
    if len(states) <= FEW_COLUMNS:  # of more states only the best is shown
        for state in states:
            columns[f"layer {state}" if state else "embeddings"] = {row.arm: cell(row.value, 100) for row in rows if row.state == state}
        note += "Then what returns when the arm continues from the base's state of the subject's last token after that layer."
    else:
        best = {arm: max((row for row in rows if row.arm == arm and row.state is not None), key=lambda row: row.value.value or 0) for arm in arms}
        columns["brought back"] = {arm: cell(row.value, 100) for arm, row in best.items()}
        columns["after layer"] = {arm: str(row.state) for arm, row in best.items()}
        note += (
            "Brought back: the most that returns when the arm continues from the base's state of the subject's last token after one layer, out of "
            f"{len(states)}; the largest of so many is biased upwards, and its interval does not include that bias."
        )
    title = "Patching: the base's state of the subject in the arm (percentage points)"
    return table(title, arms, columns, f"{note} 95 % intervals, {over(header.runs)}.")


register(Restoration())
