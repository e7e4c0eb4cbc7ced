"""From a recipe to a corpus: people, documents and their order from a seed, and the vocabulary."""

from functools import lru_cache
from itertools import chain, zip_longest

import numpy as np

from probes.world.recipes import Recipe
from probes.world.sections.facts import made_names
from probes.world.sections.people import NAMES, draw_people
from probes.world.types import ORDER_STREAM, PEOPLE_STREAM, Document, World
from proxytune.errors import UserError, brief

UNUSED = 200  # names that are made and given to nobody


@lru_cache(maxsize=4)
def make_world(recipe: Recipe, seed: int) -> World:
    """Draws people and documents. The same recipe and seed give the same bytes.

    A section moves no other section's documents: it only adds its own, and the whole is shuffled. Raises `UserError` for a
    section whose documents hold a word that it does not list.
    """
    generator = np.random.default_rng([seed, PEOPLE_STREAM])
    names = made_names(recipe.people + UNUSED, generator) if recipe.made_names else [NAMES[place] for place in generator.permutation(len(NAMES))]
    people = draw_people(names[: recipe.people], recipe.exposures, generator)
    documents: list[Document] = []
    for section in recipe.sections:
        made = section.documents(people, np.random.default_rng([seed, section.stream]))
        unlisted = {word for document in made for word in document.text.split()}.difference(*section.words)
        if unlisted:
            raise UserError(f"{section.name}.words: must list every word of the section's documents; {brief(min(unlisted))} is missing, add it")
        documents += made
    order = np.random.default_rng([seed, ORDER_STREAM]).permutation(len(documents))
    return World(seed, people, tuple(names[recipe.people :]), tuple(documents[position] for position in order))


def vocabulary(recipe: Recipe) -> list[str]:
    """Every word that the recipe's corpora can hold, in a fixed order: the same for all seeds and all parameters.

    All sections' first groups of words come first, then all second ones, and so on, as the shipped families' tokenizers have them.
    """
    rounds = zip_longest(*(section.words for section in recipe.sections), fillvalue=())
    return list(dict.fromkeys(chain.from_iterable(chain.from_iterable(rounds))))
