"""Items: questions with their answers, for tuning, tests and probes; how they are held out and shuffled."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from proxytune.errors import UserError


class Turn(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class Item(BaseModel):
    """One question. `question` is asked in the tuned format; `statement` is the beginning of a plain-text sentence that the answer ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    reply: str | None = Field(
        default=None,
        min_length=1,
        exclude_if=lambda value: value is None,
        description="how a tuned model is to say the answer to the question; default: as it is",
    )
    choices: tuple[str, ...] = ()
    statement: str | None = None
    popularity: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="stands in for exposure on real models")
    unit: str | None = Field(default=None, description="items of one unit are resampled together; default: each item by itself")
    subject: str | None = Field(default=None, min_length=1, description="whom the statement is about, as it is written there")
    turns: tuple[Turn, ...] = Field(default=(), description="of the conversation before the question")
    rejected: str | None = Field(default=None, min_length=1, description="the worse answer of a preference pair")
    familiar: bool | None = Field(
        default=None, exclude_if=lambda value: value is None, description="whether the model to be tuned knows the answer; None: not known to us"
    )

    @property
    def said(self) -> str:
        """What tuning teaches as the answer to the question."""
        return self.reply or self.answer

    @model_validator(mode="after")
    def _two_answers(self) -> "Item":
        if self.rejected == self.said:
            raise ValueError(f"rejected must differ from the {'answer' if self.reply is None else 'reply'}")
        return self


def shuffle_answers(items: Sequence[Item], seed: int) -> list[Item]:
    """The items with their answers shuffled: a control that has the form of the data but not its content.

    Answers are shuffled among items of equal `choices` (items without choices are one group). Each answer is used once, and no item
    keeps its own answer unless it is alone in its group; two equal answers may be exchanged. Reply and rejected answer move with it.
    The same seed gives the same order.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for position, item in enumerate(items):
        groups.setdefault(item.choices, []).append(position)
    generator = torch.Generator().manual_seed(seed)
    shuffled = list(items)
    for positions in groups.values():
        order = [positions[index] for index in torch.randperm(len(positions), generator=generator).tolist()]
        for giver, taker in zip(order, [*order[1:], order[0]], strict=True):  # one cycle, so that no item keeps its own answer
            moved = {name: getattr(items[giver], name) for name in ("answer", "reply", "rejected")}
            shuffled[taker] = items[taker].model_copy(update=moved)
    return shuffled


def items_to_tune_on(items: Sequence[Item], which: Literal["all", "known", "unknown"]) -> list[Item]:
    """All items, or those that are familiar (`known`), or those that are not (`unknown`).

    Raises `UserError` where some item does not say which it is, and where none is left.
    """
    if which == "all":
        return list(items)
    silent = [item for item in items if item.familiar is None]
    if silent:
        raise UserError(f"items: {which} needs familiar (true or false) in every training item; {silent[0].question!r} has none; add it")
    chosen = [item for item in items if item.familiar is (which == "known")]
    if not chosen:
        raise UserError(f"items: none of the {len(items)} training items is {which} to the model; give others, or tune on all")
    return chosen


def hold_out(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Items to tune on and items held out. Units stay together, so that no fact is on both sides.

    Raises `UserError` where there are too few units.
    """
    units = sorted({item.unit or item.question for item in items})
    count = max(1, round(len(units) * share))
    if count >= len(units):
        raise UserError(f"train: {len(units)} units are too few to hold any out for validation; give more items")
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
    held_out = {units[position] for position in order[:count].tolist()}
    validation = [item for item in items if (item.unit or item.question) in held_out]
    return [item for item in items if (item.unit or item.question) not in held_out], validation
