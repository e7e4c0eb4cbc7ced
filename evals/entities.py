"""The entities whose names are read: the shipped cities, a file of the user's, or the people of a world."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from transformers import PreTrainedTokenizerBase

from evals.study import expanded
from probes.knowledge.entities import Entity, length_in_tokens
from probes.knowledge.familiarity import familiarity
from probes.knowledge.lesson import Lesson, make_lesson
from probes.world.corpus import make_world
from probes.world.ledger import word_frequency
from probes.world.recipes import Recipe
from proxytune.errors import UserError, brief
from proxytune.files import check_readable

CITIES = "cities"
STUDIES = Path(__file__).parent / "studies"
FILE = STUDIES / "cities" / "cities.jsonl"
ORDINARY = STUDIES / "taught" / "ordinary.txt"  # what a lesson is mixed with
MADE_UP = "fabricated"  # the group of the shipped names that are no city's
# Words follow the name in each, so that the sentence's last token is another one than the name's.
OF_CITIES = ("The city of {name} is", "The mayor of {name} said", "The streets of {name} are")
OF_ANYTHING = ("They all spoke of {name} and", "Here is what is known about {name} :", "The story of {name} is")


@dataclass(frozen=True)
class Entities:
    """Entities, the most familiar group first, and the sentences that carry their names.

    `drawn` says that for each model equally many of every group are drawn at each length in tokens; `wanted` that too few are an error.
    """

    all: Sequence[Entity]
    carriers: tuple[str, ...]
    drawn: bool = True
    wanted: bool = True


class Row(BaseModel):
    """One line of a file of entities."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    group: str | None = Field(default=None, min_length=1)
    popularity: FiniteFloat | None = None


def entities_of(source: str | None, folder: Path) -> Entities:
    """`source` is a file beside `folder`, or `cities`; None stands for the cities, if the model can spell them. Raises `UserError`."""
    if source is None or source == CITIES:
        return Entities(_read(FILE), OF_CITIES, wanted=source is not None)
    return Entities(_read(folder / expanded(source)), OF_ANYTHING)


def lesson_of_cities(tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Lesson, Entities]:
    """A lesson about the shipped made-up cities, and these as entities by exposure. Raises `UserError` if the tokenizer spells too few."""
    names = [entity.name for entity in _read(FILE) if entity.group == MADE_UP]
    lengths = [length_in_tokens(tokenizer, name, OF_CITIES[0]) for name in names]
    lesson = make_lesson(names, lengths, ORDINARY.read_text(encoding="utf-8").splitlines(), seed)
    return lesson, Entities([Entity(name, str(exposure), float(exposure)) for name, exposure in lesson.names], OF_CITIES, drawn=False)


def entities_of_world(recipe: Recipe, seed: int, ledger: pd.DataFrame) -> Entities:
    """The people whom tuning does not ask about, by exposure, and names that are no one's: these, and people of exposure 0, are never seen."""
    exposure = ledger[ledger["part"] == "test"].groupby("name", sort=True)["exposure"].mean()
    unused = make_world(recipe, seed).unused[: len(exposure)]
    people = [*exposure.sort_values(ascending=False, kind="stable").items(), *((name, 0.0) for name in unused)]
    counts = word_frequency(ledger, [str(name) for name, _ in people])
    all_ = [Entity(str(name), f"{times:g}", float(times), count) for (name, times), count in zip(people, counts, strict=True)]
    return Entities(all_, tuple(opening for section in recipe.sections for opening in section.openings), drawn=False)


def _read(path: Path) -> list[Entity]:
    """JSON lines with `name`, and `group` or `popularity`. Groups stand in the file's order, the most familiar first; without them they are
    the buckets of popularity."""
    check_readable(path, "data.entities")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.entities: '{path}' cannot be read ({error}); give a file of JSON lines, or the word {CITIES}") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    names = [row.name for row in rows]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None) if len({*names}) < len(names) else None
    if twice is not None:
        raise UserError(f"data.entities: {brief(twice)} stands twice in '{path}'; leave one out")
    if all(row.group is not None for row in rows):
        groups = [str(row.group) for row in rows]
    else:
        if any(row.popularity is None for row in rows):
            raise UserError(f"data.entities: every line of '{path}' needs a group, or every line a popularity; add it")
        buckets = familiarity([float(row.popularity or 0) for row in rows])
        groups = [bucket.split("=")[1] for bucket in buckets.buckets]
        order = [label.split("=")[1] for label in reversed(buckets.labels)]
        rows, groups = zip(*sorted(zip(rows, groups, strict=True), key=lambda pair: order.index(pair[1])), strict=True)  # type: ignore[assignment]
    ranks = {group: -float(place) for place, group in enumerate(dict.fromkeys(groups))}
    if len(ranks) < 2:
        raise UserError(f"data.entities: '{path}' must hold two groups or more, not {len(ranks)}; add names that are less familiar")
    known = all(row.popularity is not None for row in rows)
    return [Entity(row.name, group, float(row.popularity or 0) if known else ranks[group]) for row, group in zip(rows, groups, strict=True)]


def _row(path: Path, number: int, line: str) -> Row:
    try:
        return Row.model_validate(json.loads(line))
    except (ValueError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(
            f"data.entities: line {number} of '{path}' must be an object with name, and group or popularity, not {brief(line)} ({reason}); mend it"
        ) from error
