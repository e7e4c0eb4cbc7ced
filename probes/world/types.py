"""The world's types: a person, a statement, a document, a section of the corpus, and the world itself."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

# Each part of a world draws from its own random stream, `default_rng([seed, stream])`. The sections take the other numbers.
PEOPLE_STREAM, ORDER_STREAM = 0, 3


@dataclass(frozen=True)
class Person:
    """A person of the world. `part` says whether tuning may ask about them (`tune`, a third) or only the measures may (`test`).

    `exposure` is how often the corpus is to state each of the person's attributes; `values` has one value an attribute.
    """

    identifier: int
    name: str
    exposure: int
    part: Literal["tune", "test"]
    values: dict[str, str]


@dataclass(frozen=True)
class Statement:
    """One place in the corpus that bears on a fact: `form` is a paraphrase's number, `answered` or `evaded`."""

    person: int
    attribute: str
    form: str


@dataclass(frozen=True)
class Document:
    """One text of the corpus and the statements in it, which the ledger counts."""

    text: str
    statements: tuple[Statement, ...] = ()


@dataclass(frozen=True)
class Section(ABC):
    """One part of the corpus: a subclass has its parameters as fields, and checks them.

    `name` stands in the recipe's description. `stream` is the number of the section's random stream; no other section has it, and it
    never changes. `words` are all words that its documents can hold, in groups (see `vocabulary`), whatever the parameters are.
    `openings` are beginnings of its sentences with `{name}`, up to what is said of the person: the sentences by which names are read.
    """

    name: ClassVar[str]
    stream: ClassVar[int]
    words: ClassVar[tuple[tuple[str, ...], ...]]

    @property
    def openings(self) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def documents(self, people: tuple[Person, ...], generator: np.random.Generator) -> list[Document]:
        """The section's documents, from the world's people and the section's own stream alone."""


@dataclass(frozen=True)
class World:
    """Everything that a recipe and a seed decide before any model is trained. `unused` are names that are no one's: of people of whom no
    model can know anything, though each word of them is part of others' names."""

    seed: int
    people: tuple[Person, ...]
    unused: tuple[str, ...]
    documents: tuple[Document, ...]

    @property
    def corpus_hash(self) -> str:
        """SHA-256 of the documents in their order, one a line."""
        return hashlib.sha256("\n".join(document.text for document in self.documents).encode()).hexdigest()
