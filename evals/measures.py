"""The measurements behind a study's measures: each asks every arm of an ensemble the same things in the same way.

A measurement is a probe with its items and its prompts. It gives one row an item for every mixture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, set_seed

from evals.material import Material
from evals.study import MeasureName, Study
from finetune.data import Item, answer_space, prompt_ids, prompt_text
from probes.density import density, gaussian_null
from probes.readouts import Answer, Progress, answer_greedily, choose, judge, judge_number
from proxytune.content import content_key
from proxytune.member import load_tokenizer
from proxytune.mixture import Mixture, active
from proxytune.modeling import ProxyTunedForCausalLM

Probe = Literal["generate", "choose", "density"]
VERSIONS: dict[Probe, int] = {"generate": 1, "choose": 1, "density": 1}


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
    if "density" in wanted:
        found.append(Measurement("density", "density", known, statements))
    return found


def measure(
    measurement: Measurement,
    model: ProxyTunedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    mixtures: Mapping[str, Mixture],
    study: Study,
    progress: Progress,
) -> dict[str, pd.DataFrame]:
    """One row an item for every mixture."""
    items, prompts = measurement.items, measurement.prompts
    if measurement.probe == "choose":
        answers = choose(model, tokenizer, items, prompts, mixtures, batch_tokens=study.batch_tokens, space=measurement.space, progress=progress)
        return {arm: _answers(items, given) for arm, given in answers.items()}
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
    return {arm: _densities(measurement, model, tokenizer, mixture, study, progress) for arm, mixture in mixtures.items()}


def workload(measurement: Measurement, arms: int) -> int:
    """How many steps `measure` reports to its progress."""
    if measurement.probe == "choose":
        return sum(len(item.choices) for item in measurement.items)
    return len(measurement.items) * arms


def _common(items: Sequence[Item]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "unit": [item.unit or item.question for item in items],
            "question": [item.question for item in items],
            "answer": [item.answer for item in items],
            "popularity": [item.popularity for item in items],
        }
    ).astype({"popularity": float})


def _answers(items: Sequence[Item], answers: Sequence[Answer]) -> pd.DataFrame:
    return _common(items).assign(
        text=[answer.text for answer in answers], right=[answer.right for answer in answers], unparsed=[answer.unparsed for answer in answers]
    )


def _densities(
    measurement: Measurement, model: ProxyTunedForCausalLM, tokenizer: PreTrainedTokenizerBase, mixture: Mixture, study: Study, progress: Progress
) -> pd.DataFrame:
    """Columns metric/view/state. An arm's own model is the only member of its mixture. Where that is the base, the
    same for an untrained model of its shape (view `untrained`) and the Gaussian null's sd (the same in every row)."""
    (name,) = active(mixture)
    member = model.members[name]
    ids = [prompt_ids(tokenizer, prompt) for prompt in measurement.prompts]
    options = {"batch_size": study.batch_size, "pad": tokenizer.pad_token_id}
    columns = density(member, ids, **options)
    if name == "base":
        set_seed(0)
        untrained = AutoModelForCausalLM.from_config(member.config, dtype=torch.float32).eval()
        drawn = density(untrained, ids, **options)
        columns |= {column.replace("/pre", "/untrained"): values for column, values in drawn.items() if column.endswith("/pre")}
    frame = _common(measurement.items)
    wide: dict[str, Any] = {f"{column}/{state}": values[:, state] for column, values in columns.items() for state in range(values.shape[1])}
    if name == "base":
        for metric, moments in gaussian_null(member, ids, **options).items():
            wide |= {f"{metric}/gaussian_sd/{state}": [value] * len(frame) for state, value in enumerate(moments["sd"])}
    progress(len(measurement.items))
    return pd.concat([frame, pd.DataFrame(wide)], axis=1)
