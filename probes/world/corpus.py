"""The synthetic corpus: who the people are, what is said of them, and how often.

A world is drawn from a seed. Every person has a first and a last name (each name token is shared with others, so that a
never-mentioned person is not a never-seen token), three attributes drawn at random, and an *exposure* k drawn at random
and independently of everything else: the corpus states each attribute of the person exactly k times, mostly in biographies
and in one of four paraphrases, the rest as answered questions. Because exposure is assigned and not observed, what
follows from it is causal.

Most questions are not answered but evaded ("nobody knows"): a model of this corpus is able to answer questions but
disinclined to, which is what tuning is then asked to change. Tuning may ask about people of the `tune` half only; the
`test` half is for the measures. Modular sums are the world's procedures; a fifth of the operand pairs is held out.

A section of the corpus is a function (people, size, generator) -> documents, listed in `SECTIONS`. Planted biases, themes
and co-occurring pairs belong here as further sections: each has its own random stream, so a new one moves no other.
Covered: English-like word-level sentences. Not covered: ambiguity, aliases, contradiction, facts that change.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

FIRST_NAMES = ("anna bruno clara david elena felix greta hugo irene jonas karin lukas maria nora oscar paula rosa simon tessa victor").split()
LAST_NAMES = (
    "adler becker costa dumont ekholm fischer garcia hansen ivanov jensen keller larsen moreau novak olsen petrov rossi silva tanaka weber"
).split()


@dataclass(frozen=True)
class Attribute:
    """One thing that is said of a person: its values, the four paraphrases that state it, and the question that asks."""

    name: str
    values: tuple[str, ...]
    templates: tuple[str, ...]
    question: str


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
    ),
)
QUESTION = "question : {question} ? answer :"
EVASION = "nobody knows ."
MODULUS = 23


@dataclass(frozen=True)
class WorldSize:
    """How much of everything: the dial that trades time against the width of the intervals.

    `question_share` of a fact's statements are answered questions; `evasion_share` of all questions are evaded.
    """

    people: int
    exposures: tuple[int, ...]
    question_share: float
    evasion_share: float
    repeats_per_sum: int


SIZES = {
    "default": WorldSize(people=400, exposures=(0, 1, 3, 10, 30, 100), question_share=0.125, evasion_share=0.6, repeats_per_sum=10),
    "tiny": WorldSize(people=48, exposures=(0, 3, 30), question_share=0.125, evasion_share=0.6, repeats_per_sum=1),
}


@dataclass(frozen=True)
class Person:
    """A person of the world. `half` says whether tuning may ask about them (`tune`) or only the measures may (`test`)."""

    identifier: int
    name: str
    exposure: int
    half: Literal["tune", "test"]
    values: dict[str, str]


@dataclass(frozen=True)
class Statement:
    """One place in the corpus that bears on a fact: `form` is a paraphrase's number, `answered` or `evaded`."""

    person: int
    attribute: str
    form: str


@dataclass(frozen=True)
class Document:
    text: str
    statements: tuple[Statement, ...] = ()


@dataclass(frozen=True)
class World:
    """Everything that a seed decides before any model is trained."""

    size: WorldSize
    seed: int
    people: tuple[Person, ...]
    documents: tuple[Document, ...]

    @property
    def corpus_hash(self) -> str:
        """SHA-256 of the documents in their order, one a line."""
        return hashlib.sha256("\n".join(document.text for document in self.documents).encode()).hexdigest()


def make_world(size: WorldSize, seed: int) -> World:
    """Draws people and documents. The same size and seed give the same bytes."""
    people = _people(size, np.random.default_rng([seed, 0]))
    documents: list[Document] = []
    for number, section in enumerate(SECTIONS, start=1):
        documents += section(people, size, np.random.default_rng([seed, number]))
    order = np.random.default_rng([seed, len(SECTIONS) + 1]).permutation(len(documents))
    return World(size, seed, people, tuple(documents[position] for position in order))


def _people(size: WorldSize, generator: np.random.Generator) -> tuple[Person, ...]:
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    chosen = generator.permutation(len(names))[: size.people]
    # Every (exposure, half) cell holds the same number of people to within one; who falls into it is random.
    cells = [(exposure, half) for exposure in size.exposures for half in ("tune", "test")]
    return tuple(
        Person(
            identifier,
            names[chosen[identifier]],
            *cells[identifier % len(cells)],  # type: ignore[arg-type]
            {attribute.name: str(generator.choice(attribute.values)) for attribute in ATTRIBUTES},
        )
        for identifier in range(size.people)
    )


def _statements(people: tuple[Person, ...], size: WorldSize, generator: np.random.Generator) -> list[Document]:
    """Biographies and questions: `exposure` biographies a person, from which some statements are moved into questions."""
    documents = []
    for person in people:
        asked = {attribute.name: generator.random(person.exposure) < size.question_share for attribute in ATTRIBUTES}
        for turn in range(person.exposure):
            order = [ATTRIBUTES[position] for position in generator.permutation(len(ATTRIBUTES))]
            told = [attribute for attribute in order if not asked[attribute.name][turn]]
            forms = [int(generator.integers(len(attribute.templates))) for attribute in told]
            sentences = [
                attribute.templates[form].format(name=person.name, value=person.values[attribute.name])
                for attribute, form in zip(told, forms, strict=True)
            ]
            if told:
                statements = tuple(Statement(person.identifier, attribute.name, str(form)) for attribute, form in zip(told, forms, strict=True))
                documents.append(Document(" ".join(sentences), statements))
        for attribute in ATTRIBUTES:
            question = QUESTION.format(question=attribute.question.format(name=person.name))
            answered = int(asked[attribute.name].sum())
            evaded = int(answered * size.evasion_share / (1 - size.evasion_share) + generator.random())
            told_answer = Document(f"{question} {person.values[attribute.name]} .", (Statement(person.identifier, attribute.name, "answered"),))
            evasion = Document(f"{question} {EVASION}", (Statement(person.identifier, attribute.name, "evaded"),))
            documents += [told_answer] * answered + [evasion] * evaded
    return documents


def held_out_sums() -> set[tuple[int, int]]:
    """The operand pairs that no corpus of any seed states."""
    pairs = [(left, right) for left in range(MODULUS) for right in range(MODULUS)]
    order = np.random.default_rng(MODULUS).permutation(len(pairs))
    return {pairs[position] for position in order[: len(pairs) // 5]}


def _sums(people: tuple[Person, ...], size: WorldSize, generator: np.random.Generator) -> list[Document]:
    hidden = held_out_sums()
    shown = [(left, right) for left in range(MODULUS) for right in range(MODULUS) if (left, right) not in hidden]
    return [Document(f"{left} plus {right} equals {(left + right) % MODULUS} .") for left, right in shown] * size.repeats_per_sum


SECTIONS: tuple[Callable[[tuple[Person, ...], WorldSize, np.random.Generator], list[Document]], ...] = (
    _statements,
    _sums,
)


def vocabulary() -> list[str]:
    """Every word that any corpus can hold, in a fixed order: the tokenizer is the same for all seeds and sizes."""
    words = [*FIRST_NAMES, *LAST_NAMES, *(str(number) for number in range(MODULUS)), *QUESTION.split(), *EVASION.split()]
    words += ["plus", "equals", "."]
    for attribute in ATTRIBUTES:
        words += [*attribute.values, *attribute.question.split()]
        words += [word for template in attribute.templates for word in template.split()]
    return [word for word in dict.fromkeys(words) if "{" not in word]
