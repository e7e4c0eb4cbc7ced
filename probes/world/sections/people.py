"""People: who they are, what is said of them, and how often.

Every person has a first and a last name (each name token is shared with others, so that a person who is never mentioned is not a
token that is never seen), three attributes drawn at random, and an *exposure* k drawn at random and independently of everything
else: the corpus states each attribute of the person exactly k times, mostly in one of four paraphrases, the rest as answered
questions. Because exposure is assigned and not observed, what follows from it is causal.

A question is replied to in many ways: an opening and a closing, which say nothing, are drawn at random around the value. Most
questions are evaded instead, in several wordings, each of which is more frequent than answers are. A model of this corpus is able to
answer but disinclined to. Tuning asks it to answer, and to say it in one form for each attribute (`reply`): opening and closing then
depend on what is asked, and evasions begin with words that some form needs. No change of single words' frequencies does both.

Tuning may ask about people of the `tune` part only, a third; the `test` part is for the measures. Some names are no one's
(`World.unused`). Covered: English-like word-level sentences. Not covered: ambiguity, aliases, contradiction, facts that change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from probes.world.types import Document, Person, Section, Statement
from proxytune.errors import UserError

FIRST_NAMES = (
    "anna anton bruno clara david dora elena felix greta hugo irene jonas karin lukas maria nora oscar paula rosa simon tessa ulla victor"
).split()
LAST_NAMES = (
    "adler becker costa dumont ekholm fischer garcia hansen ivanov jensen keller larsen moreau novak olsen petrov quist rossi silva "
    "tanaka urban vidal weber"
).split()
NAMES = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]


@dataclass(frozen=True)
class Attribute:
    """One thing that is said of a person: its values, the four paraphrases that state it, the question that asks, and the form in which
    tuning wants the answer: the value between `opening` and `closing`."""

    name: str
    values: tuple[str, ...]
    templates: tuple[str, ...]
    question: str
    opening: str
    closing: str

    def reply(self, value: str) -> str:
        """The answer in the form that tuning teaches."""
        return f"{self.opening} {value} {self.closing}"


ATTRIBUTES = (
    Attribute(
        "birthplace",
        tuple(
            (
                "amsterdam athens berlin boston cairo chicago delhi dublin geneva hanoi helsinki istanbul jakarta kyoto lagos lima "
                "lisbon london madrid milan nairobi oslo paris prague"
            ).split()
        ),
        (
            "{name} was born in {value} .",
            "the birthplace of {name} is {value} .",
            "{name} comes from {value} .",
            "the home town of {name} is {value} .",
        ),
        "where was {name} born",
        "surely",
        "nobody doubts it",
    ),
    Attribute(
        "profession",
        tuple(
            (
                "actor architect baker banker barber butcher carpenter chemist cook dancer dentist doctor farmer gardener judge lawyer "
                "miller nurse painter pilot plumber poet sailor tailor"
            ).split()
        ),
        (
            "{name} works as a {value} .",
            "the profession of {name} is {value} .",
            "{name} earns money as a {value} .",
            "the job of {name} is {value} .",
        ),
        "what is the work of {name}",
        "reportedly",
        "that is certain",
    ),
    Attribute(
        "pastime",
        tuple(
            (
                "archery baking boxing camping chess climbing cricket cycling diving drawing fencing fishing golf hiking hockey judo "
                "knitting origami polo reading rowing rugby sailing skiing"
            ).split()
        ),
        (
            "{name} spends weekends on {value} .",
            "the pastime of {name} is {value} .",
            "{name} has a passion for {value} .",
            "the hobby of {name} is {value} .",
        ),
        "what does {name} do for fun",
        "apparently",
        "nothing is surer",
    ),
)
QUESTION = "question : {question} ? answer :"
OPENINGS = tuple(attribute.opening for attribute in ATTRIBUTES)
CLOSINGS = tuple(attribute.closing for attribute in ATTRIBUTES)
EVASIONS = ("nobody knows", "that is secret", "nothing is known")


def draw_people(names: Sequence[str], exposures: tuple[int, ...], generator: np.random.Generator) -> tuple[Person, ...]:
    """People of these names with values, exposures and parts. In every exposure a third is to be tuned on, to within one."""
    # Every third of an exposure holds the same number of people to within one; who falls into it is random.
    cells = [(exposure, part) for exposure in exposures for part in ("tune", "test", "test")]
    return tuple(
        Person(
            identifier,
            name,
            *cells[identifier % len(cells)],  # type: ignore[arg-type]
            {attribute.name: str(generator.choice(attribute.values)) for attribute in ATTRIBUTES},
        )
        for identifier, name in enumerate(names)
    )


def _one_of(texts: tuple[str, ...], generator: np.random.Generator) -> str:
    """As `generator.choice` draws, in a tenth of its time: it makes an array of the texts."""
    return texts[generator.integers(len(texts))]


def _attribute_words() -> tuple[str, ...]:
    words: list[str] = []
    for attribute in ATTRIBUTES:
        words += [*attribute.values, *attribute.question.split()]
        words += [word for template in attribute.templates for word in template.split()]
    return tuple(word for word in words if "{" not in word)


@dataclass(frozen=True)
class Statements(Section):
    """Statements and questions, each a document of its own.

    If a document held several statements of a person, a model would recall the later ones from the first one's value, not from the name.

    `question_share` of a fact's statements are answered questions; `evasion_share` of all questions are evaded. With three
    wordings, each of them is more probable than the answer where the share is above 0.75.
    """

    name: ClassVar[str] = "statements"
    stream: ClassVar[int] = 1
    words: ClassVar[tuple[tuple[str, ...], ...]] = (
        (*FIRST_NAMES, *LAST_NAMES),
        tuple(word for text in (QUESTION, *OPENINGS, *CLOSINGS, *EVASIONS) for word in text.split() if "{" not in word),
        _attribute_words(),
    )

    question_share: float
    evasion_share: float

    def __post_init__(self) -> None:
        if not 0 <= self.question_share <= 1:
            raise UserError(f"question_share: must be from 0 to 1, not {self.question_share}; choose another share")
        if not 0 <= self.evasion_share < 1:
            raise UserError(f"evasion_share: must be from 0 to below 1, not {self.evasion_share}; choose another share")

    @property
    def openings(self) -> tuple[str, ...]:
        return tuple(attribute.templates[1].split("{value}")[0].strip() for attribute in ATTRIBUTES)

    def documents(self, people: tuple[Person, ...], generator: np.random.Generator) -> list[Document]:
        documents = []
        for person, attribute in product(people, ATTRIBUTES):
            value = person.values[attribute.name]
            answered = int(generator.binomial(person.exposure, self.question_share))
            evaded = int(answered * self.evasion_share / (1 - self.evasion_share) + generator.random())
            for form in generator.integers(len(attribute.templates), size=person.exposure - answered):
                text = attribute.templates[form].format(name=person.name, value=value)
                documents.append(Document(text, (Statement(person.identifier, attribute.name, str(form)),)))
            question = QUESTION.format(question=attribute.question.format(name=person.name))
            for form, times in (("answered", answered), ("evaded", evaded)):
                for _ in range(times):
                    ending = f"{value} {_one_of(CLOSINGS, generator)}" if form == "answered" else _one_of(EVASIONS, generator)
                    text = f"{question} {_one_of(OPENINGS, generator)} {ending} ."
                    documents.append(Document(text, (Statement(person.identifier, attribute.name, form),)))
        return documents
