"""Sums: modular addition, the world's one procedure. A fifth of the operand pairs is held out."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from probes.world.types import Document, Person, Section
from proxytune.errors import UserError

MODULUS = 23


def held_out_sums() -> set[tuple[int, int]]:
    """The operand pairs that no corpus of any seed states."""
    pairs = [(left, right) for left in range(MODULUS) for right in range(MODULUS)]
    order = np.random.default_rng(MODULUS).permutation(len(pairs))
    return {pairs[position] for position in order[: len(pairs) // 5]}


@dataclass(frozen=True)
class Sums(Section):
    """Every sum that is not held out, `repeats_per_sum` times. Nothing is drawn at random."""

    name: ClassVar[str] = "sums"
    stream: ClassVar[int] = 2
    words: ClassVar[tuple[tuple[str, ...], ...]] = (tuple(str(number) for number in range(MODULUS)), ("plus", "equals", "."))

    repeats_per_sum: int

    def __post_init__(self) -> None:
        if self.repeats_per_sum < 1:
            raise UserError(f"repeats_per_sum: must be at least 1, not {self.repeats_per_sum}; leave the section out of the recipe instead")

    def documents(self, people: tuple[Person, ...], generator: np.random.Generator) -> list[Document]:
        hidden = held_out_sums()
        shown = [(left, right) for left in range(MODULUS) for right in range(MODULUS) if (left, right) not in hidden]
        return [Document(f"{left} plus {right} equals {(left + right) % MODULUS} .") for left, right in shown] * self.repeats_per_sum
