"""Tokens: what each member gave every token of an answer, and where the base alone would have said another one.

Twenty items of each world or data set, at most 200 a study, with the answers of every arm in the first seed. They are drawn from the task's items,
always the same (items at even distances may all ask the same kind of question). They are too few to tell arms apart; they show how an answer arose.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from evals.display.cells import Table, cell, table
from evals.measures.answers import Asked
from evals.measures.inputs import Inputs
from evals.measures.measure import Frames, Measure, Progress, Reading, Settings
from evals.measures.registry import register
from evals.measures.subjects import Outputs
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import by_unit, intervals
from evals.statistics.value import Value, value_of
from finetune.encoding import prompt_ids
from proxytune.explanation import explain
from proxytune.mixture import active

EACH, MOST = 20, 200  # items of a world or data set, and of a study
DIGITS = 4


@dataclass(frozen=True)
class Explained(Asked):
    """The frame `tokens` has one row an answer: the item's `number`, how many tokens it has and how many the base alone would not have chosen there,
    and, as JSON, the tokens: text, probability under each member and the mixture, and the base's choice where it is another."""

    version: ClassVar[int] = 1
    beside_base: ClassVar[bool] = True

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        return super().decides(inputs) | {"new_tokens": inputs.data.new_tokens, "numbers": numbers(inputs)}

    def frames(self, subject: Outputs, inputs: Inputs) -> tuple[str, ...]:
        return (self.name,) if numbers(inputs) else ()

    def steps(self, subject: Outputs, inputs: Inputs) -> int:
        return len(numbers(inputs)) * len(subject.mixtures)

    def read(self, subject: Outputs, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        places, items = numbers(inputs), inputs.items(self.items)
        prompts = inputs.prompts(self.items, self.form)
        found = {}
        for arm in subject.mixtures:
            rows = []
            for place in places:
                rows.append(_explained(subject, arm, prompt_ids(subject.tokenizer, prompts[place]), inputs.data.new_tokens))
                progress(1)
            units = [items[place].unit or items[place].question for place in places]
            found[arm] = {self.name: pd.DataFrame({"unit": units, "number": places}).join(pd.DataFrame(rows))}
        return found


def numbers(inputs: Inputs) -> list[int]:
    """The places of the items that are explained; none for later seeds, and where answers are chosen and not generated."""
    study, count = inputs.study, len(inputs.data.test)
    each = min(count, EACH, MOST // max(1, len(study.worlds)))
    if inputs.seed != study.seeds[0] or inputs.data.choose or not each:
        return []
    return sorted(np.random.default_rng(0).permutation(count)[:each].tolist())


def _explained(subject: Outputs, arm: str, ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
    model, tokenizer = subject.model, subject.tokenizer
    model.mixture = subject.mixtures[arm]
    inputs = torch.tensor([list(ids)], device=model.device)
    with torch.inference_mode():
        said = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=new_tokens)[0].tolist()
    rows = explain(model, said, len(ids))
    alone = len(active(model.mixture)) == 1  # one model, which has the arm's name
    tokens = [
        {
            "token": tokenizer.decode([row.token]),
            "members": {arm if alone and name != "base" else name: _known(value) for name, value in row.members.items()},
            "mixture": _known(row.mixture),
            "base": tokenizer.decode([row.base_choice]) if row.changed else None,
        }
        for row in rows
    ]
    return {"length": float(len(rows)), "changed": float(sum(row.changed for row in rows)), "tokens": json.dumps(tokens, ensure_ascii=False)}


def _known(probability: float) -> float | None:
    return None if np.isnan(probability) else round(probability, DIGITS)


@dataclass(frozen=True)
class Changed:
    """Of one arm: answers, their tokens, and the share of an answer's tokens that the base alone would not have chosen there (mean over answers)."""

    arm: str
    answers: int
    tokens: int
    changed: Value


@dataclass(frozen=True)
class AllChanged:
    arms: tuple[Changed, ...]


class Tokens(Measure[AllChanged]):
    name = "tokens"
    question = "Which tokens of an answer would the base alone not have chosen, and who gave them their probability?"
    controls = "The base itself, which always makes its own choice; items drawn, not chosen by what an arm says."
    needs = frozenset({"test"})
    summary = AllChanged
    of_answers = True

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        return [Explained("tokens", "test", "question")]

    def summarize(self, records: Recorded, settings: Settings) -> AllChanged:
        return AllChanged(tuple(_changed(records, arm) for arm in records.arms("tokens")))

    def tables(self, summary: AllChanged, header: Header) -> list[Table]:
        columns = {
            "not the base's choice (% of an answer's tokens)": {one.arm: cell(one.changed, 100) for one in summary.arms},
            "answers": {one.arm: str(one.answers) for one in summary.arms},
            "tokens": {one.arm: str(one.tokens) for one in summary.arms},
        }
        note = "Answers of the first seed to items that were drawn; 95 % intervals over answers. The report shows them token by token."
        return table("Tokens that the base alone would not have chosen", columns["answers"], columns, note)


def _changed(records: Recorded, arm: str) -> Changed:
    frames = records("tokens", arm)
    shares = [by_unit(frame, (frame["changed"] / frame["length"].clip(lower=1)).to_numpy(float)[:, None]) for frame in frames]
    value = value_of(intervals(records.estimate(shares), (0.0, 1.0))[0])
    return Changed(arm, sum(map(len, frames)), int(sum(frame["length"].sum() for frame in frames)), value)


register(Tokens())
