"""The data of one run of a study: where its models are, and its items. From the embedded world or from the user."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from evals.entities import Entities, entities_of, entities_of_world, lesson_of_cities
from evals.measures.registry import measures
from evals.study import Run, Study, expanded
from finetune.formats import read_items
from finetune.items import Item
from finetune.overlap import describe, overlap
from probes.knowledge.counts import count_documents
from probes.knowledge.familiarity import familiarity
from probes.knowledge.lesson import Facts, Lesson, as_tuning_items
from probes.world.family import find_family
from probes.world.ledger import items_of, word_frequency
from probes.world.recipes import recipe_of
from probes.world.sections.people import QUESTION
from proxytune.errors import UserError
from proxytune.member import load_tokenizer

# Of the embedded worlds: the longest reply, and an answer to a statement, each with its full stop.
REPLY_TOKENS, STATEMENT_TOKENS = 6, 2


@dataclass(frozen=True)
class StudyData:
    """Models and items of one run, and the protocol by which every arm is asked.

    Items that the study does not need are empty lists. `ending` follows each answer in the tuning data. `choose` says that the task is
    a choice among candidates instead of a generated text; `number` says that a text is judged by its last number. `frequency` is how
    often the corpus has each knowledge item's words. A statement is continued by `statement_tokens` (None: `new_tokens`). `entities` are those
    whose names are read, if a measure reads them. `lesson` is what arms with `teach` are tuned on, and `knowledge` then its facts.
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
    number: bool = False
    frequency: Sequence[float] | None = None
    statement_tokens: int | None = None
    entities: Entities | None = None
    lesson: Lesson | None = None

    def taught(self, facts: Facts) -> "StudyData":
        """The data of an arm that a lesson is taught to: its sentences are tuned on."""
        assert self.lesson is not None
        return replace(self, train=as_tuning_items(self.lesson.sentences[facts]))


def data_for(study: Study, folder: Path, run: Run, worlds: Path, say: Callable[[str], None] = lambda line: None) -> StudyData:
    """The data of one run. A world's family must be shipped or already be in the folder `worlds` (see `probes.world.family.find_family`).

    `say` is called with remarks on the data (duplicates, ignored columns). `folder` is that of the study file. Raises `UserError` for data
    that cannot be read, that lack something a measure needs, or whose test items are also tuned on.
    """
    wanted = {need for name in study.measures for need in measures()[name].needs | measures()[name].reads}
    if run.world is not None:
        family = find_family(run.world, run.seed, worlds, checkpoints=study.reads_checkpoints)
        if family is None:
            raise UserError(f"world: '{run.world}' of seed {run.seed} is not in '{worlds}'; build it with 'proxytune world build'")
        ledger = pd.read_parquet(family / "ledger.parquet")
        test = items_of(ledger, "test")
        train = items_of(ledger, "tune")
        return StudyData(
            str(family / "base"),
            str(family / "small") if (family / "small").exists() else None,
            train,
            test,
            test,
            QUESTION,
            " .",
            REPLY_TOKENS,
            choose=False,
            frequency=word_frequency(ledger, [str(item.subject) for item in test]),
            statement_tokens=STATEMENT_TOKENS,
            entities=entities_of_world(recipe_of(run.world), run.seed, ledger) if "entities" in wanted else None,
        )
    assert study.models is not None and study.data is not None
    data = study.data
    train, test, knowledge = (
        [] if source is None else _read(source, folder, f"data.{field}", say)
        for field, source in (("train", data.train), ("test", data.test), ("knowledge", data.knowledge))
    )
    common = overlap(train, test)
    if common.duplicates or common.shared or common.near:
        say(f"data: {describe(common)}")
    if common.shared and not data.allow_overlap:
        raise UserError(f"data.test: {describe(common)}; take them out of one, or set data.allow_overlap: true")
    wanted |= {"test.choices"} if data.answer == "choose" else set()
    parts: dict[str, Sequence[Item]] = {"test": test, "knowledge": knowledge}
    for field, _, attribute in sorted(need.partition(".") for need in wanted if need != "knowledge.popularity"):
        for item in parts[field] if attribute else ():
            if not getattr(item, attribute):
                raise UserError(f"data.{field}: the item {item.question!r} has no {attribute}; every item there needs it")
    frequency: list[float] | None = None
    if data.corpus is not None:
        counts = count_documents(folder / expanded(data.corpus), knowledge)
        say(f"data.corpus: {sum(count > 0 for count in counts.together)} of {len(knowledge)} statements stand in it")
        knowledge = [item.model_copy(update={"popularity": count}) for item, count in zip(knowledge, counts.together, strict=True)]
        frequency = counts.subject
    if "knowledge.popularity" in wanted and data.knowledge is not None:
        familiarity([float("nan") if item.popularity is None else item.popularity for item in knowledge])  # raises now rather than after the study
    small, base = study.models.small, _place(study.models.base, folder)
    lesson: Lesson | None = None
    entities: Entities | None = None
    if study.teaches:
        lesson, entities = lesson_of_cities(load_tokenizer(base, "models.base"), run.seed)
        knowledge = list(lesson.items)
    elif "entities" in wanted:
        entities = entities_of(data.entities, folder)
    return StudyData(
        base,
        None if small is None else _place(small, folder),
        train,
        test,
        knowledge,
        data.prompt,
        "",
        data.new_tokens,
        data.answer == "choose",
        data.answer == "number",
        frequency,
        entities=entities,
        lesson=lesson,
    )


def _read(source: str, folder: Path, field: str, say: Callable[[str], None]) -> list[Item]:
    place = folder / expanded(source)
    examples = read_items(place if place.exists() or Path(source).suffix else source, field)
    if examples.ignored:
        say(f"{field}: {examples.shape}; columns that are not read: {', '.join(examples.ignored)}")
    return examples.items


def _place(name: str, folder: Path) -> str:
    """A folder beside the study file if there is one, otherwise the name itself: an absolute path or a hub name."""
    place = expanded(name)
    return str(folder / place) if (folder / place).exists() else str(place) if name.startswith("~") else name
