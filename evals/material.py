"""What a study works on for one seed: where its models are, and its items. The world's or the user's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from transformers import TrainerCallback

from evals.study import Study
from finetune.data import Item
from finetune.reading import read_items
from probes.forgetting import familiarity
from probes.world.corpus import QUESTION
from probes.world.family import build_family, find_family
from probes.world.ledger import items_of
from proxytune.errors import UserError


@dataclass(frozen=True)
class Material:
    """Models and items of one seed, and the protocol by which every arm is asked.

    `ending` follows an answer in the tuning data; `choose` says that the task is a choice and not a text.
    """

    base: str
    small: str | None
    train: Sequence[Item]
    test: Sequence[Item]
    knowledge: Sequence[Item]
    prompt: str
    ending: str
    new_tokens: int
    choose: bool


def material_for(study: Study, folder: Path, seed: int, cache: Path, watcher: TrainerCallback | None = None) -> Material:
    """The material of one seed; a world's family that is neither shipped nor in `cache` is pretrained into it.

    `folder` is the study file's. Raises `UserError` for data that cannot be read or that tests what it trains on.
    """
    if study.world is not None:
        family = find_family(study.world, seed, cache) or build_family(study.world, seed, cache, watcher)
        ledger = pd.read_parquet(family / "ledger.parquet")
        test = items_of(ledger, "test")
        return Material(str(family / "base"), str(family / "small"), items_of(ledger, "tune"), test, test, QUESTION, " .", 3, choose=False)
    assert study.models is not None and study.data is not None
    data = study.data
    train, test = read_items(folder / data.train, "data.train").items, read_items(folder / data.test, "data.test").items
    overlap = {item.question for item in train} & {item.question for item in test}
    if overlap:
        raise UserError(f"data.test: {len(overlap)} questions are also in data.train, the first {min(overlap)!r}; take them out of one")
    knowledge = read_items(folder / data.knowledge, "data.knowledge").items if data.knowledge else []
    for field, items, attribute in (("data.knowledge", knowledge, "statement"), ("data.test", test if data.answer == "choose" else [], "choices")):
        for item in items:
            if not getattr(item, attribute):
                raise UserError(f"{field}: the item {item.question!r} has no {attribute}; every item there needs it")
    if {"forgetting", "density"} & set(study.measures):
        familiarity([float("nan") if item.popularity is None else item.popularity for item in knowledge])  # refuses now what the table could not show
    small = study.models.small
    return Material(
        _place(study.models.base, folder),
        None if small is None else _place(small, folder),
        train,
        test,
        knowledge,
        data.prompt,
        "",
        data.new_tokens,
        data.answer == "choose",
    )


def _place(name: str, folder: Path) -> str:
    """A folder beside the study file if there is one, else the name as it stands: an absolute path or a hub name."""
    expanded = Path(name).expanduser()
    return str(folder / expanded) if (folder / expanded).exists() else str(expanded) if name.startswith("~") else name
