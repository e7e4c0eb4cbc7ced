"""Novelty: which of the tuning items teach new facts. The base is asked; no other arm is (`probes.knowledge.known_items`).

A study whose arms are tuned on known or unknown items only (`items` of `Tuning`) takes the choice from the same records.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from evals.display.cells import Table, table
from evals.measures.inputs import Inputs, as_content, common_columns
from evals.measures.measure import Frames, Measure, Progress, Reading, Settings
from evals.measures.registry import register
from evals.measures.subjects import Outputs
from evals.results.header import Header
from evals.results.recorded import Recorded
from finetune.encoding import prompt_ids
from finetune.items import Item
from probes.knowledge.familiarity import familiarity
from probes.knowledge.known_items import SAMPLES, TEMPERATURE, judge_words, recall, recall_prompts
from probes.knowledge.readouts import judge_number
from proxytune.content import content_key

NAME = "novelty"
ALL = "all"


@dataclass(frozen=True)
class Recalled(Reading):
    """Whether the base knows each tuning item. The frame has one row an item: its key (`item_key`), `known`, and the `samples`."""

    name: str = NAME
    version: ClassVar[int] = 1
    subject: ClassVar[type[Outputs]] = Outputs

    def frames(self, subject: Outputs, inputs: Inputs) -> tuple[str, ...]:
        return (self.name,) if subject.labels == [inputs.study.base_arm] else ()

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        how = {"samples": SAMPLES, "temperature": TEMPERATURE, "new_tokens": inputs.data.new_tokens, "number": inputs.data.number}
        return {"items": as_content(inputs.data.train), "prompts": self._prompts(inputs)} | how

    def first_prompt(self, inputs: Inputs) -> str | None:
        first = next(((prompt, item) for prompt, item in zip(self._prompts(inputs), inputs.data.train, strict=True) if prompt is not None), None)
        if first is None:
            return None
        prompt, item = first
        return f"first prompt {json.dumps(prompt)} = {prompt_ids(inputs.tokenizer, prompt)}, answer {item.answer!r}"

    def steps(self, subject: Outputs, inputs: Inputs) -> int:
        return SAMPLES * sum(prompt is not None for prompt in self._prompts(inputs))

    def read(self, subject: Outputs, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        data, base = inputs.data, inputs.study.base_arm
        subject.model.mixture = subject.mixtures[base]
        found = recall(
            subject.model,
            subject.tokenizer,
            data.train,
            self._prompts(inputs),
            seed=inputs.seed,
            new_tokens=data.new_tokens,
            batch_size=inputs.study.batch_size,
            judged=judge_number if data.number else judge_words,
            progress=progress,
        )
        columns: dict[str, Any] = {
            "item": [item_key(item) for item in data.train],
            "known": [one.known for one in found],
            "samples": [list(one.samples) for one in found],
        }
        return {base: {self.name: common_columns(data.train).assign(**columns)}}

    def _prompts(self, inputs: Inputs) -> list[str | None]:
        data = inputs.data
        made: list[str | None] = inputs.once(self, lambda: recall_prompts(data.train, inputs.tokenizer, data.prompt, data.ending))
        return made


def item_key(item: Item) -> str:
    """A hash of an item, by which its row is found."""
    return content_key(item=item.model_dump())


def marked(items: Sequence[Item], frame: pd.DataFrame) -> list[Item]:
    """The items with `familiar` as it was read. The frame may hold other items, too."""
    known = dict(zip(frame["item"], frame["known"].tolist(), strict=True))
    return [item.model_copy(update={"familiar": known[item_key(item)]}) for item in items]


def counted(frame: pd.DataFrame) -> str:
    return f"the base knows {frame['known'].sum()} of {len(frame)} tuning items"


@dataclass(frozen=True)
class Level:
    """The tuning items of one bucket of exposure, or all: how many are known and unknown to the base, in each run."""

    exposure: str
    known: tuple[int, ...]
    unknown: tuple[int, ...]


@dataclass(frozen=True)
class Novel:
    levels: tuple[Level, ...]


class Novelty(Measure[Novel]):
    name = NAME
    question = "Which of the tuning items teach new facts, because the base does not know them?"
    controls = (
        "A statement to continue, or a worked example with another answer, shows the form. Guessing is not controlled for: see what was never stated."
    )
    needs = frozenset({"train"})
    summary = Novel

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        return [Recalled()]

    def summarize(self, records: Recorded, settings: Settings) -> Novel:
        runs = [_by_exposure(frame) for frame in records(self.name, records.study.base_arm)]
        levels = dict.fromkeys(level for run in runs for level in run)
        none = Counter[bool]()
        return Novel(tuple(Level(level, *(tuple(run.get(level, none)[known] for run in runs) for known in (True, False))) for level in levels))

    def tables(self, summary: Novel, header: Header) -> list[Table]:
        columns = {
            "known": {one.exposure: str(sum(one.known)) for one in summary.levels},
            "unknown": {one.exposure: str(sum(one.unknown)) for one in summary.levels},
            "known (%)": {one.exposure: f"{100 * sum(one.known) / sum(one.known + one.unknown):.1f}" for one in summary.levels},
        }
        if header.runs > 1:
            columns["known, each run"] = {one.exposure: ", ".join(map(str, one.known)) for one in summary.levels}
        note = (
            f"Tuning items whose answer the base gives in at least one of {SAMPLES} samples at temperature {TEMPERATURE:g}, as it continues their "
            "statement (where there is none, after a worked example); or that say so themselves. The others teach new facts."
        )
        return table("Novelty", columns["known"], columns, note, first="tuning items")


def _by_exposure(frame: pd.DataFrame) -> dict[str, Counter[bool]]:
    """How many items of each bucket are known (True) and unknown; by exposure where items have one that differs."""
    found = {ALL: Counter(frame["known"].tolist())}
    if frame["popularity"].notna().all() and frame["popularity"].nunique() > 1:
        buckets = familiarity(frame["popularity"].tolist())
        for label in buckets.labels:
            found[label] = Counter(frame["known"][[bucket == label for bucket in buckets.buckets]].tolist())
    return found


register(Novelty())
