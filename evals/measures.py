"""The measurements behind a study's measures: each asks every arm of an ensemble the same things in the same way.

A measurement is a probe with its items and its prompts. It gives one row an item for every mixture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from evals.material import Material
from evals.study import MeasureName, Study
from finetune.encoding import answer_space, prompt_ids, prompt_text
from finetune.items import Item
from probes.drift import divergence
from probes.knowledge.readouts import Answer, Progress, answer_greedily, choose, judge, judge_number
from proxytune.content import content_key
from proxytune.errors import UserError
from proxytune.member import load_tokenizer
from proxytune.mixture import Mixture
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.padding import left_padded

Probe = Literal["generate", "choose", "law"]
VERSIONS: dict[Probe, int] = {"generate": 1, "choose": 2, "law": 1}


@dataclass(frozen=True)
class Measurement:
    """`name` is what tables look for; two of the same content give the same records whatever their names are."""

    name: str
    probe: Probe
    items: Sequence[Item]
    prompts: Sequence[str]
    new_tokens: int = 0
    space: str = " "
    number: bool = False

    @cached_property
    def protocol(self) -> str:
        """A hash of all that decides how arms are asked. Rows whose protocol differs cannot stand in one table."""
        return content_key(
            probe=self.probe,
            version=VERSIONS[self.probe],
            items=[item.model_dump() for item in self.items],
            prompts=list(self.prompts),
            new_tokens=self.new_tokens,
            space=self.space,
            number=self.number,
        )


def measurements(study: Study, material: Material) -> list[Measurement]:
    """What has to be measured for the study's measures."""
    wanted: set[MeasureName] = set(study.measures)
    task, known = material.test, material.knowledge
    tokenizer = load_tokenizer(material.base, "models.base")
    questions = [prompt_text(item, tokenizer, material.prompt) for item in task]
    statements = [item.statement or "" for item in known]
    found = []
    if "task" in wanted:
        if material.choose:
            found.append(Measurement("task", "choose", task, questions, space=answer_space(material.prompt)))
        else:
            found.append(Measurement("task", "generate", task, questions, material.new_tokens, number=material.number))
    if wanted & {"knowledge", "forgetting"}:
        found.append(Measurement("statement", "generate", known, statements, material.new_tokens))
    if "forgetting" in wanted:
        asked = [prompt_text(item, tokenizer, material.prompt) for item in known]
        found.append(Measurement("question", "generate", known, asked, material.new_tokens))
        if all(item.choices for item in known):
            found.append(Measurement("choice", "choose", known, statements))
    if "drift" in wanted:
        found.append(Measurement("law", "law", known, statements))
    return found


def measure(
    measurement: Measurement,
    model: ProxyTunedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    mixtures: Mapping[str, Mixture],
    study: Study,
    progress: Progress,
) -> dict[str, pd.DataFrame]:
    """One row an item for every mixture. `right` is a share and stands beside `tied` where a choice was made; else it is a bool."""
    items, prompts = measurement.items, measurement.prompts
    if measurement.probe == "choose":
        answers = choose(model, tokenizer, items, prompts, mixtures, batch_tokens=study.batch_tokens, space=measurement.space, progress=progress)
        return {arm: _answers(items, given).astype({"right": float}).assign(tied=[one.tied for one in given]) for arm, given in answers.items()}
    if measurement.probe == "generate":
        frames = {}
        for arm, mixture in mixtures.items():
            model.mixture = mixture
            given = answer_greedily(
                model,
                tokenizer,
                items,
                prompts,
                new_tokens=measurement.new_tokens,
                batch_size=study.batch_size,
                judged=judge_number if measurement.number else judge,
                progress=progress,
            )
            frames[arm] = _answers(items, given)
        return frames
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    drifts = _divergences(model, ids, mixtures, study.batch_size, int(tokenizer.pad_token_id), progress)
    return {arm: common_columns(items).assign(divergence=values) for arm, values in drifts.items()}


def workload(measurement: Measurement, arms: int) -> int:
    """How many steps `measure` reports to its progress."""
    if measurement.probe == "choose":
        return sum(len(item.choices) for item in measurement.items)
    if measurement.probe == "law":
        return len(measurement.items)
    return len(measurement.items) * arms


def common_columns(items: Sequence[Item]) -> pd.DataFrame:
    """Who was asked what, in the columns that every record of items has."""
    return pd.DataFrame(
        {
            "unit": [item.unit or item.question for item in items],
            "question": [item.question for item in items],
            "answer": [item.answer for item in items],
            "popularity": [item.popularity for item in items],
        }
    ).astype({"popularity": float})


def _answers(items: Sequence[Item], answers: Sequence[Answer]) -> pd.DataFrame:
    return common_columns(items).assign(
        text=[answer.text for answer in answers], right=[answer.right for answer in answers], unparsed=[answer.unparsed for answer in answers]
    )


def _divergences(
    model: ProxyTunedForCausalLM, prompts: Sequence[Sequence[int]], mixtures: Mapping[str, Mixture], batch_size: int, pad: int, progress: Progress
) -> dict[str, list[float]]:
    """KL(base || arm) of the law of the token after each prompt, in nats; the base is the member of that name."""
    found: dict[str, list[float]] = {arm: [] for arm in mixtures}
    for start in range(0, len(prompts), batch_size):
        ids, mask = left_padded(prompts[start : start + batch_size], pad, model.device)
        laws = {}
        for arm, mixture in {"": {"base": 1.0}, **mixtures}.items():
            model.mixture = mixture
            with torch.inference_mode():
                laws[arm] = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
        for arm in mixtures:
            values = divergence(laws[""], laws[arm])
            if not values.isfinite().all():
                number = start + int((~values.isfinite()).nonzero()[0]) + 1
                raise UserError(f"drift: '{arm}' has no finite divergence from the base for item {number}; take models that are not broken")
            found[arm] += values.tolist()
        progress(len(ids))
    return found
