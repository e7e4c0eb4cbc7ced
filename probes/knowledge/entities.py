"""Entities by name: groups that differ in how familiar they are, matched in tokens for the model at hand, in sentences that carry them.

Groups are matched because a name of more tokens is read differently from one of fewer, whether it is known or not. Not covered: names
of equal length whose tokens are of different kinds; `separation.alike` compares names of like surprisal and token frequency.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.encoding import prompt_ids
from proxytune.errors import UserError

LENGTHS = 2  # so many lengths in tokens, those that most names of every group have
MOST, LEAST = 60, 20  # names of each group at each length


class Entity(NamedTuple):
    """A name, its group, and how popular what it names is. `frequency` is how often a corpus has the name's words, where that was counted."""

    name: str
    group: str
    popularity: float
    frequency: float | None = None


class Carried(NamedTuple):
    """A sentence that carries a name: its token ids, and the places of the name's first and last token."""

    ids: list[int]
    first: int
    last: int

    @property
    def name_ids(self) -> list[int]:
        return self.ids[self.first : self.last + 1]


def carry(tokenizer: PreTrainedTokenizerBase, name: str, carrier: str) -> Carried:
    """The name in place of `{name}`. A token that holds the name's end and more is the name's last."""
    before, after = carrier.split("{name}")
    text = f"{before}{name}{after}"
    ids = prompt_ids(tokenizer, text)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"][: len(ids)]
    inside = [place for place, (start, stop) in enumerate(offsets) if stop > len(before) and start < len(before) + len(name) and stop > start]
    return Carried(ids, inside[0], inside[-1])


def length_in_tokens(tokenizer: PreTrainedTokenizerBase, name: str, carrier: str) -> int:
    """0 for a name that the tokenizer cannot spell: one that it does not give back."""
    ids = carry(tokenizer, name, carrier).name_ids
    return len(ids) if tokenizer.decode(ids).strip().casefold() == name.casefold() else 0


def groups_of(entities: Sequence[Entity]) -> list[str]:
    """The groups in the order of their first entities: the most familiar one first."""
    return list(dict.fromkeys(entity.group for entity in entities))


def matched_in_tokens(entities: Sequence[Entity], lengths: Sequence[int], seed: int = 0) -> list[Entity]:
    """Equally many entities of every group at each length, drawn at random: up to 60 of each, at the two lengths that have most.

    Raises `UserError` if there is no length at which every group has 20.
    """
    groups = groups_of(entities)
    of_groups = np.array([groups.index(entity.group) for entity in entities])
    counts = np.zeros((max(lengths) + 1, len(groups)), int)
    np.add.at(counts, (np.asarray(lengths), of_groups), 1)
    counts[0] = 0
    drawn = np.minimum(counts.min(axis=1), MOST)
    chosen = [length for length in np.argsort(-drawn, kind="stable")[:LENGTHS] if drawn[length] >= LEAST]
    if not chosen:
        best = int(drawn.argmax())
        there = ", ".join(f"{count} {group}" for group, count in zip(groups, counts[best], strict=True))
        raise UserError(
            f"data.entities: names of every group are compared at equal lengths in tokens, at least {LEAST} of each; "
            f"the best length, {best}, has {there}; give more names of the group that has fewest"
        )
    generator = np.random.default_rng(seed)
    places = [
        generator.choice(np.flatnonzero((np.asarray(lengths) == length) & (of_groups == group)), drawn[length], replace=False)
        for length in sorted(chosen)
        for group in range(len(groups))
    ]
    return [entities[place] for place in sorted(np.concatenate(places).tolist())]
