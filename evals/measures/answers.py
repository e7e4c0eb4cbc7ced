"""Readings of an arm's outputs: answers that it generates or chooses, and the divergence of its next-token distribution from the base's."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch

from evals.measures.inputs import Form, Inputs, Which, as_content, common_columns
from evals.measures.measure import Frames, Progress, Reading
from evals.measures.subjects import Outputs
from finetune.encoding import answer_space, prompt_ids
from finetune.items import Item
from probes.drift import divergence
from probes.knowledge.readouts import Answer, choose, continuations, judge, judge_number, judge_reply
from proxytune.content import content_key
from proxytune.errors import UserError
from proxytune.mixture import Mixture, bias_of
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.padding import left_padded


@dataclass(frozen=True)
class Asked(Reading):
    """Items asked in one form. The frame has the reading's name and one row per item."""

    name: str
    items: Which
    form: Form
    subject: ClassVar[type[Outputs]] = Outputs

    def frames(self, subject: Outputs, inputs: Inputs) -> tuple[str, ...]:
        return (self.name,)

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        return {"items": as_content(inputs.items(self.items)), "prompts": inputs.prompts(self.items, self.form)}

    def first_prompt(self, inputs: Inputs) -> str:
        prompt = inputs.prompts(self.items, self.form)[0]
        return f"first prompt {json.dumps(prompt)} = {prompt_ids(inputs.tokenizer, prompt)}, answer {inputs.items(self.items)[0].answer!r}"


@dataclass(frozen=True)
class Generated(Asked):
    """Answers by greedy decoding. An answer is right if it begins with the item's answer or, with `number`, if its last number is right."""

    number: bool = False
    version: ClassVar[int] = 1

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        return super().decides(inputs) | {"new_tokens": self._new_tokens(inputs), "number": self.number}

    def steps(self, subject: Outputs, inputs: Inputs) -> int:
        return len(inputs.items(self.items)) * len(subject.mixtures)

    def read(self, subject: Outputs, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        items = inputs.items(self.items)
        judged = judge_number if self.number else judge_reply if self.form == "question" else judge
        found = {}
        for arm in subject.mixtures:
            texts = self._texts(arm, subject, inputs, progress)
            found[arm] = {self.name: _answers(items, [judged(text, item) for text, item in zip(texts, items, strict=True)])}
        return found

    def _texts(self, arm: str, subject: Outputs, inputs: Inputs, progress: Progress) -> list[str]:
        """What the arm says. Two readings may ask the same (task, and forgetting in the task's form): it then says it once."""
        prompts, new_tokens = inputs.prompts(self.items, self.form), self._new_tokens(inputs)
        fresh = False

        def generate() -> list[str]:
            nonlocal fresh
            fresh = True
            subject.model.mixture = subject.mixtures[arm]
            questions = [item.question for item in inputs.items(self.items)]
            options: dict[str, Any] = {"new_tokens": new_tokens, "batch_size": inputs.study.batch_size, "progress": progress}
            return continuations(subject.model, subject.tokenizer, prompts, questions, **options)

        texts = inputs.once(("texts", content_key(prompts=prompts, new_tokens=new_tokens, **subject.causes(arm))), generate)
        if not fresh:
            progress(len(prompts))
        return list(texts)

    def _new_tokens(self, inputs: Inputs) -> int:
        return inputs.data.statement_tokens or inputs.data.new_tokens if self.form == "statement" else inputs.data.new_tokens


@dataclass(frozen=True)
class Chosen(Asked):
    """The candidate with the highest log-probability per token. `right` is a share: a tie of k candidates counts 1/k and is marked in `tied`."""

    version: ClassVar[int] = 2

    def decides(self, inputs: Inputs) -> dict[str, Any]:
        return super().decides(inputs) | {"space": self._space(inputs)}

    def steps(self, subject: Outputs, inputs: Inputs) -> int:
        return sum(len(item.choices) for item in inputs.items(self.items))

    def read(self, subject: Outputs, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        items, prompts = inputs.items(self.items), inputs.prompts(self.items, self.form)
        options: dict[str, Any] = {"batch_tokens": inputs.study.batch_tokens, "space": self._space(inputs), "progress": progress}
        answers = choose(subject.model, subject.tokenizer, items, prompts, subject.mixtures, **options)
        return {
            arm: {self.name: _answers(items, given).astype({"right": float}).assign(tied=[one.tied for one in given])}
            for arm, given in answers.items()
        }

    def _space(self, inputs: Inputs) -> str:
        return answer_space(inputs.data.prompt) if self.form == "question" else " "


@dataclass(frozen=True)
class Divergence(Asked):
    """KL(base || arm) of the next-token distribution after each prompt, in nats; infinite for an arm whose bias bans a token."""

    version: ClassVar[int] = 1
    beside_base: ClassVar[bool] = True

    def steps(self, subject: Outputs, inputs: Inputs) -> int:
        return len(inputs.items(self.items))

    def read(self, subject: Outputs, inputs: Inputs, progress: Progress) -> dict[str, Frames]:
        prompts = [prompt_ids(subject.tokenizer, prompt) for prompt in inputs.prompts(self.items, self.form)]
        pad = int(subject.tokenizer.pad_token_id)
        found = _divergences(subject.model, prompts, subject.mixtures, inputs.study.batch_size, pad, progress)
        return {arm: {self.name: common_columns(inputs.items(self.items)).assign(divergence=values)} for arm, values in found.items()}


def _answers(items: Sequence[Item], answers: Sequence[Answer]) -> pd.DataFrame:
    return common_columns(items).assign(
        text=[answer.text for answer in answers], right=[answer.right for answer in answers], unparsed=[answer.unparsed for answer in answers]
    )


def _divergences(
    model: ProxyTunedForCausalLM, prompts: Sequence[Sequence[int]], mixtures: Mapping[str, Mixture], batch_size: int, pad: int, progress: Progress
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {arm: [] for arm in mixtures}
    for start in range(0, len(prompts), batch_size):
        ids, mask = left_padded(prompts[start : start + batch_size], pad, model.device)
        logits = {}
        for arm, mixture in {"": {"base": 1.0}, **mixtures}.items():
            model.mixture = mixture
            with torch.inference_mode():
                logits[arm] = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
        for arm, mixture in mixtures.items():
            values, bias = divergence(logits[""], logits[arm]), bias_of(mixture)
            broken = values.isnan() if bias is not None and bias.bans else ~values.isfinite()
            if broken.any():
                number = start + int(broken.nonzero()[0]) + 1
                raise UserError(f"drift: '{arm}' has no finite divergence from the base for item {number}; use models that are not broken")
            found[arm] += values.tolist()
        progress(len(ids))
    return found
