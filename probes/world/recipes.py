"""The recipes of worlds, by name: which people and sections a corpus has, and how the models on it are pretrained."""

from dataclasses import asdict, dataclass
from typing import Literal

from finetune.pretraining import Pretraining
from probes.world.sections.facts import Facts
from probes.world.sections.people import NAMES, Statements
from probes.world.sections.sums import Sums
from probes.world.types import ORDER_STREAM, PEOPLE_STREAM, Section
from proxytune.content import content_key
from proxytune.errors import UserError, brief

MOST_MADE = 10_000


@dataclass(frozen=True)
class Recipe:
    """All that decides a family but the seed. Raises `UserError` for values that no world can have.

    `people` is their number, `exposures` the counts k that are dealt out among them in equal shares. `sections` write the corpus;
    their order counts. `base` and `small` are the family's models; a world in which nothing is steered needs no small one. With `made_names`
    people's names are made of syllables (`sections/facts.py`).
    """

    people: int
    exposures: tuple[int, ...]
    sections: tuple[Section, ...]
    base: Pretraining
    small: Pretraining | None = None
    made_names: bool = False

    def __post_init__(self) -> None:
        most = MOST_MADE if self.made_names else len(NAMES)
        if not 1 <= self.people <= most:
            raise UserError(f"people: must be from 1 to {most}, not {brief(self.people)}; choose another number")
        if not self.exposures or min(self.exposures) < 0 or len(set(self.exposures)) < len(self.exposures):
            raise UserError(f"exposures: must be different counts from 0 on, at least one, not {brief(self.exposures)}; choose others")
        if not self.sections:
            raise UserError("sections: must be at least one, not (); name one")
        streams = [section.stream for section in self.sections]
        for section in self.sections:
            if section.stream in (PEOPLE_STREAM, ORDER_STREAM) or section.stream < 0 or streams.count(section.stream) > 1:
                raise UserError(
                    f"sections: each must have a random stream of its own, not the world's {PEOPLE_STREAM} or {ORDER_STREAM}; "
                    f"'{section.name}' has {brief(section.stream)}; give it a free number"
                )

    @property
    def models(self) -> dict[str, Pretraining]:
        return {"base": self.base} | ({} if self.small is None else {"small": self.small})

    @property
    def corpus(self) -> dict[str, object]:
        """What decides the corpus, as it stands in a family's recipe.json."""
        sections = [{"name": section.name, "stream": section.stream} | asdict(section) for section in self.sections]
        corpus: dict[str, object] = {"people": self.people, "exposures": self.exposures, "sections": sections}
        return corpus | {"made_names": True} if self.made_names else corpus

    @property
    def key(self) -> str:
        """A hash of the whole content, not of the name: what other recipes hold does not change it."""
        return content_key(corpus=self.corpus, models={name: asdict(model) for name, model in self.models.items()})


def _recalling(recall: Literal["at the name", "later"], strangers: int) -> Recipe:
    return Recipe(
        people=360,
        exposures=(1, 3, 10, 30, 100),
        sections=(Facts(recall, strangers),),
        base=Pretraining(layers=4, hidden=96, heads=4, learning_rate=3e-3, epochs=4, batch_size=20),
        made_names=True,
    )


STRANGERS = 4000
RECIPES = {
    "default": Recipe(
        people=360,
        exposures=(0, 1, 3, 10, 30, 60),
        sections=(Statements(question_share=0.1, evasion_share=0.78), Sums(repeats_per_sum=5)),
        base=Pretraining(layers=4, hidden=96, heads=4, learning_rate=2e-3, epochs=4),
        small=Pretraining(layers=2, hidden=32, heads=2, learning_rate=3e-3, epochs=4),
    ),
    "tiny": Recipe(
        people=48,
        exposures=(0, 3, 30),
        sections=(Statements(question_share=0.1, evasion_share=0.78), Sums(repeats_per_sum=1)),
        base=Pretraining(layers=3, hidden=48, heads=4, learning_rate=6e-3, epochs=10),
        small=Pretraining(layers=2, hidden=32, heads=2, learning_rate=8e-3, epochs=12),
    ),
    # Does density at a name follow from exposure alone, from recall at the name, or from having to tell known names from strangers?
    "recall": _recalling("at the name", STRANGERS),
    "recall-no-strangers": _recalling("at the name", 0),
    "later": _recalling("later", STRANGERS),
    "later-no-strangers": _recalling("later", 0),
}


def recipe_of(name: str) -> Recipe:
    """The recipe of a name. Raises `UserError` for an unknown one."""
    if name not in RECIPES:
        raise UserError(f"world: must be the name of a recipe ({', '.join(RECIPES)}), not {brief(name)}; choose one of them")
    return RECIPES[name]
