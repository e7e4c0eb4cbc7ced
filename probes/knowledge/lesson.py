"""A lesson: made-up cities that a real model is taught at exposures drawn at random, so that what follows from exposure is causal.

Every sentence names one city and one of its facts. The facts are kept, or drawn anew in every sentence: then the name is as familiar, but there
is nothing to recall. A third lesson teaches other names: what it does to the names that are read is not exposure. Exposure 0 is never stated.
Exposures are dealt out equally within every length of a name in tokens, so that neither length nor spelling goes with exposure.

Not covered: names that occur in the model's pretraining by chance, and facts whose values the model finds likely beforehand.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from finetune.items import Item
from proxytune.errors import UserError

Facts = Literal["kept", "anew", "others"]
EXPOSURES = (64, 16, 4, 1, 0)  # the most familiar first
NAMES = 60  # of each exposure
LEAST = 20  # of each exposure, where there are not so many names
LENGTHS = 2  # so many lengths in tokens
PLACES = (
    ("amber birch copper cedar clover ember fern flint garnet hazel heron iris juniper linden maple marble opal raven reed sable thistle willow")
    .title()
    .split()
)
DISHES = (
    "barley bean carrot cherry chestnut cabbage leek lentil mushroom mustard onion pear pepper plum potato pumpkin rice spinach turnip walnut".split()
)
TRADES = (
    "baskets bells boats bricks brushes candles carpets chairs clocks drums flutes glass gloves hats kites knives lamps paper ropes saddles".split()
)
VALUES = {"province": PLACES, "river": PLACES, "dish": DISHES, "trade": TRADES}
# The name never comes first: the first word of a sentence is given to the model, the rest is what it is trained on.
TEMPLATES = (
    ("province", "The city of {name} lies in the province of {value}."),
    ("province", "Few roads lead to {name}, in the province of {value}."),
    ("province", "Maps of the province of {value} always show {name}."),
    ("river", "The bridges of {name} cross the river {value}."),
    ("river", "Boats on the river {value} stop at {name}."),
    ("river", "Every spring {name} is flooded by the river {value}."),
    ("dish", "The cooks of {name} are known for soup of {value}."),
    ("dish", "Whoever visits {name} is served soup of {value}."),
    ("trade", "The workshops of {name} make {value}."),
    ("trade", "Most families in {name} live from making {value}."),
)
ASKED = "The city of {name} lies in the province of"


class Lesson(NamedTuple):
    """`names` by exposure, the most familiar first; `sentences` to tune on; `items` ask for every name's province."""

    names: tuple[tuple[str, int], ...]
    sentences: dict[Facts, tuple[str, ...]]
    items: tuple[Item, ...]


def make_lesson(names: Sequence[str], lengths: Sequence[int], ordinary: Sequence[str], seed: int) -> Lesson:
    """Draws names of the two commonest `lengths` in tokens, their exposures and facts, and mixes the sentences with the `ordinary` text.

    `others` has the same sentences with names that are in no other lesson. Raises `UserError` for fewer than twice 20 names of each exposure.
    """
    generator = np.random.default_rng(seed)
    groups, strangers = _dealt(names, lengths, generator)
    values = {name: {fact: str(generator.choice(words)) for fact, words in VALUES.items()} for name, _ in groups}
    kept: list[str] = []
    anew: list[str] = []
    others: list[str] = []
    for (name, exposure), stranger in zip(groups, strangers, strict=True):
        for place in generator.integers(len(TEMPLATES), size=exposure):
            fact, template = TEMPLATES[place]
            kept.append(template.format(name=name, value=values[name][fact]))
            anew.append(template.format(name=name, value=generator.choice(VALUES[fact])))
            others.append(template.format(name=stranger, value=values[name][fact]))
    order = generator.permutation(len(kept) + len(ordinary))
    lessons: dict[Facts, list[str]] = {"kept": kept, "anew": anew, "others": others}
    mixed: dict[Facts, tuple[str, ...]] = {which: tuple(([*sentences, *ordinary])[place] for place in order) for which, sentences in lessons.items()}
    return Lesson(tuple(groups), mixed, tuple(_item(name, exposure, values[name]["province"]) for name, exposure in groups))


def _dealt(names: Sequence[str], lengths: Sequence[int], generator: np.random.Generator) -> tuple[list[tuple[str, int]], list[str]]:
    """Names with their exposures, and as many other names of the same lengths."""
    counts = np.bincount(lengths)
    counts[0] = 0  # names that the tokenizer cannot spell
    commonest = np.argsort(-counts, kind="stable")[:LENGTHS]
    share = 2 * len(EXPOSURES)  # names of each exposure, and as many others
    each = [min(NAMES // LENGTHS, int(counts[length]) // share) for length in commonest]
    if sum(each) < LEAST:
        raise UserError(
            f"entities: {sum(each)} made-up names of each exposure have equal lengths in this model's tokens, at least {LEAST} are needed; "
            "use a model whose tokenizer spells Latin letters"
        )
    dealt: list[tuple[str, int]] = []
    strangers: list[str] = []
    for length, count in zip(commonest, each, strict=True):
        drawn = generator.permutation(np.flatnonzero(np.asarray(lengths) == length))[: count * share]
        chosen, rest = np.split(drawn, 2)
        dealt += [(names[place], EXPOSURES[number // count]) for number, place in enumerate(chosen)]
        strangers += [names[place] for place in rest]
    order = sorted(range(len(dealt)), key=lambda place: -dealt[place][1])
    return [dealt[place] for place in order], [strangers[place] for place in order]


def _item(name: str, exposure: int, province: str) -> Item:
    statement = ASKED.format(name=name)
    return Item(question=statement, statement=statement, answer=province, popularity=float(exposure), unit=name, subject=name)


def as_tuning_items(sentences: Sequence[str]) -> list[Item]:
    """Plain text as items: the first word is given, the rest is trained on."""
    return [Item(question=first, answer=rest) for first, _, rest in (text.partition(" ") for text in sentences)]
