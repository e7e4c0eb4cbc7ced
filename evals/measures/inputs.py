"""What readings work with: the items, prompts and settings of one world or data set and one seed."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
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
from probes.knowledge.entities import Carried, Entity, carry, length_in_tokens, matched_in_tokens
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
    """`study` gives batch sizes, which do not change results; `data` gives models and items. All prompts are in the base's tokens. `folder` is
    that of the study file."""

    study: Study
    data: StudyData
    seed: int
    folder: Path = Path()
    _kept: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.data.base, "models.base")

    def items(self, which: Which) -> Sequence[Item]:
        return self.data.test if which == "test" else self.data.knowledge

    def prompts(self, which: Which, form: Form) -> list[str]:
        """The prompt of every item: its question in the study's format, or its statement, which is to be continued."""
        if form == "statement":
            return [item.statement or "" for item in self.items(which)]
        return [prompt_text(item, self.tokenizer, self.data.prompt) for item in self.items(which)]

    @cached_property
    def inside(self) -> Prompts:
        """The knowledge statements, for readings of hidden states."""
        statements, items = self.prompts("knowledge", "statement"), self.data.knowledge
        return Prompts(
            ids=[prompt_ids(self.tokenizer, statement) for statement in statements],
            positions=last_and_subject(self.tokenizer, items, statements),
            answers=[continuation_ids(self.tokenizer, item.answer)[0] for item in items],
            contrast=familiarity([float("nan") if item.popularity is None else item.popularity for item in items]).contrast,
        )

    @cached_property
    def entities(self) -> tuple[list[Entity], list[list[Carried]]]:
        """The entities that are read, and for each the sentences that carry its name; none if the tokenizer spells too few of those that the study
        did not ask for. Raises `UserError` if it spells too few of those that it asked for."""
        of = self.data.entities
        if of is None:
            return [], []
        chosen = list(of.all)
        if of.drawn:
            try:
                chosen = matched_in_tokens(of.all, [length_in_tokens(self.tokenizer, entity.name, of.carriers[0]) for entity in of.all])
            except UserError:
                if of.wanted:
                    raise
                chosen = []
        return chosen, [[carry(self.tokenizer, entity.name, carrier) for carrier in of.carriers] for entity in chosen]

    @cached_property
    def task(self) -> list[Item]:
        """A sample of the task's items, the same in every run."""
        return list(self.data.test[:: max(1, len(self.data.test) // TASK_ITEMS)][:TASK_ITEMS])

    @cached_property
    def texts(self) -> list[str]:
        """The texts that the lens' translators are fitted on: the tuning data; without any, the task's items; without any, the statements.

        The knowledge statements are avoided: a translator that is fitted on them would memorize their last states.
        """
        data = self.data
        statements = dict.fromkeys(str(item.statement) for item in data.knowledge)
        read = [item for item in (data.train or data.test) if item.statement not in statements]
        texts = [f"{prompt_text(item, self.tokenizer, data.prompt)}{answer_space(data.prompt)}{item.said}" for item in read]
        texts += [f"{item.statement} {item.answer}" for item in read if item.statement is not None]
        texts = texts or list(statements)
        return [texts[place] for place in np.random.default_rng(0).permutation(len(texts))]

    @property
    def has_subjects(self) -> bool:
        return all(item.subject is not None for item in self.data.knowledge)

    def known(self, member: Member) -> Known:
        """What a model knows of the knowledge items; computed once for each model's weights."""
        return self.once(("known", member.fingerprint), lambda: self.known_now(member))

    def known_now(self, member: Member) -> Known:
        """The same, computed anew: for a model whose weights change between calls."""
        return known(member, self.data.knowledge, batch_tokens=self.study.batch_tokens)

    def task_log_probability(self, member: Member) -> np.ndarray:
        """Mean log-probability per token (nats) of each task item's answer after its prompt."""
        prompt, tokenizer = self.data.prompt, member.tokenizer
        requests = []
        for item in self.task:
            answer = continuation_ids(tokenizer, item.said, answer_space(prompt))
            requests.append(Request(tuple(prompt_ids(tokenizer, prompt_text(item, tokenizer, prompt))), tuple(answer)))
        totals = self._scored(member, requests)
        if not totals.isfinite().all():
            item = self.task[int((~totals.isfinite()).nonzero()[0])]
            name = member.model.name_or_path or type(member.model).__name__
            raise UserError(f"task: '{name}' gives the answer of {item.question!r} no finite probability; use a model that is not broken")
        return (totals / torch.tensor([len(request.continuation) for request in requests])).numpy()

    def name_log_probability(self, member: Member) -> np.ndarray:
        """Log-probability (nats) of each entity's name after what precedes it, a mean over the sentences that carry it."""
        carried = self.entities[1]
        requests = [Request(tuple(each.ids[: each.first]), tuple(each.name_ids)) for of_name in carried for each in of_name]
        return self._scored(member, requests).numpy().reshape(len(carried), -1).mean(axis=1)

    def _scored(self, member: Member, requests: Sequence[Request]) -> torch.Tensor:
        """The log-probability (nats) of every request's continuation."""
        model = ProxyTunedForCausalLM({"model": member}, {"model": 1.0})
        return score(model, requests, {"model": {"model": 1.0}}, batch_tokens=self.study.batch_tokens)["model"]

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """A value that several readings of this process need, made once. `key` names the weights by their fingerprint."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def common_columns(items: Sequence[Item]) -> pd.DataFrame:
    """The columns that every frame with one row per item has: unit, question, answer, popularity."""
    return pd.DataFrame(
        {
            "unit": [item.unit or item.question for item in items],
            "question": [item.question for item in items],
            "answer": [item.answer for item in items],
            "popularity": [item.popularity for item in items],
        }
    ).astype({"popularity": float})


def as_content(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Items as they go into a record's key."""
    return [item.model_dump() for item in items]
