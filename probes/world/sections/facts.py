"""Facts about people with made names: recalled at the name, or only later in the sentence; beside strangers of whom nobody knows anything.

Names are three syllables of sixty, drawn at random, so that a name is several tokens and none of them alone tells who is meant. The section
crosses two things on which density at a name may depend. `recall`: in one template of three the value follows the name at once, or one
word later, so that the model has to recall the fact at the name's last token or may wait. `strangers`: names that occur once, in place of
whose value stands "nobody knows"; with them the model has to tell at the name whether it knows it. Exposure, people and values are those
of the other sections: drawn at random, so that what follows from exposure is causal.

Covered: plain statements. Not covered: questions; tuning has to teach their form.
"""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import numpy as np

from probes.world.sections.people import ATTRIBUTES, QUESTION
from probes.world.types import Document, Person, Section, Statement
from proxytune.errors import UserError

SYLLABLES = tuple(f"{consonant}{vowel}" for consonant, vowel in product("bdfgklmnprst", "aeiou"))
NOBODY = "nobody knows"
# Half of all names may be people's or no one's; strangers have the other half. No syllable tells them apart.
_ORDER = np.random.default_rng(len(SYLLABLES)).permutation(len(SYLLABLES) ** 3)


def made_names(count: int, generator: np.random.Generator, *, strangers: bool = False) -> list[str]:
    """So many different names, at random. A stranger's name is never that of a person."""
    half = _ORDER[len(_ORDER) // 2 :] if strangers else _ORDER[: len(_ORDER) // 2]
    places = np.unravel_index(generator.choice(half, count, replace=False), (len(SYLLABLES),) * 3)
    return [" ".join(SYLLABLES[place] for place in name) for name in zip(*places, strict=True)]


@dataclass(frozen=True)
class Facts(Section):
    """Every fact as often as its person is exposed, in one of three templates at random, each a document of its own; and the strangers.

    Form 0 is the template that `recall` decides, forms 1 and 2 are those of `people`.
    """

    name: ClassVar[str] = "facts"
    stream: ClassVar[int] = 4
    words: ClassVar[tuple[tuple[str, ...], ...]] = (
        SYLLABLES,
        tuple(dict.fromkeys(word for text in (QUESTION, NOBODY) for word in text.split() if "{" not in word)),
        tuple(
            dict.fromkeys(
                word
                for attribute in ATTRIBUTES
                for text in (attribute.name, *attribute.values, attribute.question, *attribute.templates, attribute.reply(""))
                for word in text.split()
                if "{" not in word
            )
        ),
    )

    recall: Literal["at the name", "later"]
    strangers: int

    def __post_init__(self) -> None:
        if not 0 <= self.strangers <= len(_ORDER) // 2:
            raise UserError(f"strangers: must be from 0 to {len(_ORDER) // 2}, not {self.strangers}; choose another number")

    @property
    def templates(self) -> dict[str, tuple[str, str, str]]:
        """The three templates of every attribute."""
        return {
            attribute.name: (
                f"{attribute.name} {{name}} {{value}} ." if self.recall == "at the name" else attribute.templates[2],
                attribute.templates[0],
                attribute.templates[1],
            )
            for attribute in ATTRIBUTES
        }

    @property
    def openings(self) -> tuple[str, ...]:
        """Those of form 0: where the section's worlds differ."""
        return tuple(templates[0].split("{value}")[0].strip() for templates in self.templates.values())

    def documents(self, people: tuple[Person, ...], generator: np.random.Generator) -> list[Document]:
        documents = []
        for person, (attribute, templates) in product(people, self.templates.items()):
            for form in generator.integers(len(templates), size=person.exposure):
                text = templates[form].format(name=person.name, value=person.values[attribute])
                documents.append(Document(text, (Statement(person.identifier, attribute, str(form)),)))
        every = [template for templates in self.templates.values() for template in templates]
        for name in made_names(self.strangers, generator, strangers=True):
            documents.append(Document(every[generator.integers(len(every))].format(name=name, value=NOBODY)))
        return documents
