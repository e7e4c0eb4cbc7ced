"""What readings ask with: the items, prompts and settings of one world or data set and one seed."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from evals.data import StudyData
from evals.study import Study
from finetune.encoding import answer_space, continuation_ids, prompt_ids, prompt_text
from finetune.items import Item
from probes.inside import Prompts
from probes.internals.activations import last_and_subject
from probes.knowledge.candidates import Known, known
from probes.knowledge.familiarity import familiarity
from proxytune.errors import UserError
from proxytune.member import Member, load_tokenizer
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.scoring import Request, score

Which = Literal["test", "knowledge"]
Form = Literal["question", "statement"]
TASK_ITEMS = 32


@dataclass(frozen=True)
class Inputs:
    """`study` gives batch sizes, which decide nothing; `data` the models and items. All prompts are in the base's tokens."""

    study: Study
    data: StudyData
    seed: int
    _kept: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.data.base, "models.base")

    def items(self, which: Which) -> Sequence[Item]:
        return self.data.test if which == "test" else self.data.knowledge

    def prompts(self, which: Which, form: Form) -> list[str]:
        """What is asked of every item: its question in the study's format, or its statement to continue."""
        if form == "statement":
            return [item.statement or "" for item in self.items(which)]
        return [prompt_text(item, self.tokenizer, self.data.prompt) for item in self.items(which)]

    @cached_property
    def inside(self) -> Prompts:
        """The knowledge statements for those who look inside models."""
        statements, items = self.prompts("knowledge", "statement"), self.data.knowledge
        return Prompts(
            ids=[prompt_ids(self.tokenizer, statement) for statement in statements],
            positions=last_and_subject(self.tokenizer, items, statements),
            answers=[continuation_ids(self.tokenizer, item.answer)[0] for item in items],
            contrast=familiarity([float("nan") if item.popularity is None else item.popularity for item in items]).contrast,
        )

    @cached_property
    def task(self) -> list[Item]:
        """A sample of the task's items, the same in every run."""
        return list(self.data.test[:: max(1, len(self.data.test) // TASK_ITEMS)][:TASK_ITEMS])

    @cached_property
    def texts(self) -> list[str]:
        """The language that the lens' translators are fitted on: the tuning data, or where there are none, the task, or else the statements.

        Statements are avoided: a translator that was fitted on them would know their last states by heart.
        """
        data = self.data
        statements = dict.fromkeys(str(item.statement) for item in data.knowledge)
        read = [item for item in (data.train or data.test) if item.statement not in statements]
        texts = [f"{prompt_text(item, self.tokenizer, data.prompt)}{answer_space(data.prompt)}{item.answer}" for item in read]
        texts += [f"{item.statement} {item.answer}" for item in read if item.statement is not None]
        texts = texts or list(statements)
        return [texts[place] for place in np.random.default_rng(0).permutation(len(texts))]

    @property
    def has_subjects(self) -> bool:
        return all(item.subject is not None for item in self.data.knowledge)

    def known(self, member: Member) -> Known:
        """What a model knows of the knowledge items; read once for each model's weights."""
        return self.once(("known", member.fingerprint), lambda: self.known_now(member))

    def known_now(self, member: Member) -> Known:
        """The same of a model whose weights are changed on the way."""
        return known(member, self.data.knowledge, batch_tokens=self.study.batch_tokens)

    def task_log_probability(self, member: Member) -> np.ndarray:
        """Mean log-probability a token (nats) of each task item's answer after its prompt."""
        prompt, tokenizer = self.data.prompt, member.tokenizer
        requests = []
        for item in self.task:
            answer = continuation_ids(tokenizer, item.answer, answer_space(prompt))
            requests.append(Request(tuple(prompt_ids(tokenizer, prompt_text(item, tokenizer, prompt))), tuple(answer)))
        model = ProxyTunedForCausalLM({"model": member}, {"model": 1.0})
        totals = score(model, requests, {"model": {"model": 1.0}}, batch_tokens=self.study.batch_tokens)["model"]
        if not totals.isfinite().all():
            item = self.task[int((~totals.isfinite()).nonzero()[0])]
            name = member.model.name_or_path or type(member.model).__name__
            raise UserError(f"task: '{name}' gives the answer of {item.question!r} no finite probability; take a model that is not broken")
        return (totals / torch.tensor([len(request.continuation) for request in requests])).numpy()

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What several readings of this process need, made once. `key` names the weights by their fingerprint."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


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


def as_content(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as they enter a key."""
    return [item.model_dump() for item in items]
