"""Text: what an arm expects of ordinary text, beside the base. Every token of every text is a prompt's end."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from evals.display.cells import Table, cell, over, table
from evals.display.chart import Chart, arm_bars
from evals.measures.inputs import Inputs
from evals.measures.measure import Frames, Measure, Progress, Reading, Settings
from evals.measures.registry import register
from evals.measures.subjects import Outputs
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import by_unit, intervals
from evals.statistics.value import Value, value_of
from evals.study import STUDIES, expanded
from finetune.encoding import prompt_ids
from probes.drift import divergence
from proxytune.errors import UserError
from proxytune.files import check_readable

FILE = STUDIES / "prose" / "prose.jsonl"
INFINITE = "infinite"
SPELLED = 0.9  # of a text's letters, at least


class TextSettings(Settings):
    file: str | None = Field(
        default=None, description="JSON lines with text, relative to the study file; default: shipped prose, in the public domain, with its sources"
    )


class Passage(BaseModel):
    """A line of the file. Source and licence are for people."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1)
    source: str = ""
    licence: str = ""


PASSAGES = TypeAdapter(list[Passage])


@dataclass(frozen=True)
class Read(Reading):
    """The frame `text` has one row a text: its tokens, and per token the arm's loss and KL(base || arm), in nats."""

    file: str | None = None
    version: ClassVar[int] = 1
    subject: ClassVar[type[Outputs]] = Outputs
    beside_base: ClassVar[bool] = True

    def frames(self, subject: Outputs, inputs: Inputs) -> tuple[str, ...]:
        return (self.name,)

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        return {"texts": self._texts(inputs)}

    def first_prompt(self, inputs: Inputs) -> str:
        text = self._texts(inputs)[0]
        return f"first text {json.dumps(text[:60])}… = {prompt_ids(inputs.tokenizer, text)[:12]}…"

    def steps(self, subject: Outputs, inputs: Inputs) -> int:
        return len(self._texts(inputs))

    def read(self, subject: Outputs, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        texts = self._texts(inputs)
        rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in subject.mixtures}
        for ids in tokens_of(texts, inputs.tokenizer):
            for arm, found in expected(subject, ids).items():
                rows[arm].append(found)
            progress(1)
        units = {"unit": [str(number) for number in range(len(texts))], "question": texts}
        return {arm: {self.name: pd.DataFrame(units | {"popularity": float("nan")}).join(pd.DataFrame(of_arm))} for arm, of_arm in rows.items()}

    def _texts(self, inputs: Inputs) -> list[str]:
        return inputs.once(self, lambda: texts_of(FILE if self.file is None else inputs.folder / expanded(self.file)))


def tokens_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Raises `UserError` for a text that the tokenizer cannot spell, or of one token."""
    found = [prompt_ids(tokenizer, text) for text in texts]
    for text, ids in zip(texts, found, strict=True):
        spelled = len(_letters(tokenizer.decode(ids, skip_special_tokens=True))) / max(1, len(_letters(text)))
        if spelled < SPELLED:
            raise UserError(f"text.file: the base's tokenizer spells {spelled:.0%} of {text[:40]!r}; give texts that it can spell")
        if len(ids) < 2:
            raise UserError(f"text.file: {text!r} has fewer than two tokens; leave it out")
    return found


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def texts_of(path: Path) -> list[str]:
    """Raises `UserError` for a file that is not of the form."""
    check_readable(path, "text.file")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [passage.text for passage in PASSAGES.validate_python(lines)]
    except (OSError, ValueError, ValidationError) as error:
        raise UserError(f'text.file: \'{path}\' must have lines like {{"text": "..."}} ({str(error).splitlines()[0]}); mend it') from error
    if not found:
        raise UserError(f"text.file: '{path}' holds no text; give one or more")
    return found


def expected(subject: Outputs, ids: Sequence[int]) -> dict[str, dict[str, float]]:
    """For each arm: the tokens after the first, the mean loss and the mean KL(base || arm) over them, in nats."""
    inputs, model = torch.tensor([list(ids)], device=subject.model.device), subject.model
    after = inputs[0, 1:]
    logits = {}
    for arm, mixture in {"": {"base": 1.0}, **subject.mixtures}.items():
        model.mixture = mixture
        with torch.inference_mode():
            logits[arm] = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits[0, :-1].float()
    return {
        arm: {
            "tokens": float(len(after)),
            "loss": torch.nn.functional.cross_entropy(logits[arm], after).item(),
            "divergence": divergence(logits[""], logits[arm]).mean().item(),
        }
        for arm in subject.mixtures
    }


@dataclass(frozen=True)
class Expected:
    """Of one arm, per token: KL(base || arm), its loss, and its loss minus the base's (None for the base), in nats; means over texts."""

    arm: str
    kl: Value
    loss: Value
    change: Value | None


@dataclass(frozen=True)
class Texts:
    arms: tuple[Expected, ...]
    texts: int


class Text(Measure[Texts]):
    name = "text"
    question = "What does an arm expect of ordinary text, beside the base?"
    controls = "Text that is not tuned on and has nothing to do with the task; every token counts."
    settings = TextSettings
    summary = Texts
    of_answers = True

    def readings(self, inputs: Inputs, settings: TextSettings) -> list[Reading]:
        return [Read("text", settings.file)]

    def summarize(self, records: Recorded, settings: TextSettings) -> Texts:
        base = records("text", records.study.base_arm)
        return Texts(tuple(_expected(records, arm, base) for arm in records.arms("text")), len(base[0]) if base else 0)

    def tables(self, summary: Texts, header: Header) -> list[Table]:
        columns = {
            "KL(base || arm)": {one.arm: cell(one.kl, 1, 3) for one in summary.arms},
            "loss": {one.arm: cell(one.loss, 1, 3) for one in summary.arms},
            "loss, arm minus base": {one.arm: cell(one.change, 1, 3) for one in summary.arms if one.change is not None},
        }
        note = f"Nats per token, means over {summary.texts} texts; 95 % intervals, paired, {over(header.runs)}."
        return table("Ordinary text", [one.arm for one in summary.arms], columns, note)

    def charts(self, summary: Texts, header: Header) -> Iterable[Chart]:
        shown = {one.arm: one.change for one in summary.arms if one.change is not None and one.change.value is not None}
        if shown:
            panel = arm_bars(shown, "text", "", "loss, arm minus base (nats per token)")
            yield Chart("text", f"{header.title}: ordinary text, paired 95 % intervals", (panel,), paired=True)


def _expected(records: Recorded, arm: str, base: Sequence[pd.DataFrame]) -> Expected:
    frames = records("text", arm)
    changed = [frame.assign(loss=frame["loss"] - of["loss"]) for frame, of in zip(frames, base, strict=True)]
    return Expected(
        arm,
        _mean(records, frames, "divergence", 0.0),
        _mean(records, frames, "loss", 0.0),
        None if arm == records.study.base_arm else _mean(records, changed, "loss", -np.inf),
    )


def _mean(records: Recorded, frames: Sequence[pd.DataFrame], column: str, lowest: float) -> Value:
    if any(np.isinf(frame[column]).any() for frame in frames):
        return Value(None, note=INFINITE)
    return value_of(intervals(records.estimate([by_unit(frame, frame[[column]].to_numpy(float)) for frame in frames]), (lowest, np.inf))[0])


register(Text())
