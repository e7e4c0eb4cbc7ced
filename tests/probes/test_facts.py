"""Worlds of facts about people with made names."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency

from probes.world.corpus import UNUSED, make_world
from probes.world.ledger import make_ledger
from probes.world.recipes import RECIPES, Recipe
from probes.world.sections.facts import NOBODY, SYLLABLES, Facts, made_names
from probes.world.sections.people import ATTRIBUTES

FACTS = {recall: replace(RECIPES["recall"], people=60, exposures=(1, 5, 20), sections=(Facts(recall, 50),)) for recall in ("at the name", "later")}


def evaded(recipe: Recipe) -> list[str]:
    return [document.text for document in make_world(recipe, 0).documents if document.text.endswith(f"{NOBODY} .")]


def test_a_value_follows_the_name_at_once_in_one_template_of_three_or_never() -> None:
    for recall, recipe in FACTS.items():
        world = make_world(recipe, 0)
        names, values = {person.name for person in world.people}, {value for attribute in ATTRIBUTES for value in attribute.values}
        words = [document.text.split() for document in world.documents if document.statements]
        after = [next(place for place in range(len(each)) if " ".join(each[place : place + 3]) in names) + 3 for each in words]
        at_once = sum(each[place] in values for each, place in zip(words, after, strict=True)) / len(words)
        assert at_once == (pytest.approx(1 / 3, abs=0.03) if recall == "at the name" else 0)
    # Nothing else differs: the same people are stated as often, and the same strangers are met.
    pd.testing.assert_frame_equal(*(make_ledger(make_world(recipe, 0)) for recipe in FACTS.values()))
    strangers = [{" ".join(word for word in text.split() if word in SYLLABLES) for text in evaded(recipe)} for recipe in FACTS.values()]
    assert strangers[0] == strangers[1]
    assert len(strangers[0]) == 50


def test_exposure_of_made_names_is_exact_and_unused_names_are_nobodys() -> None:
    world = make_world(FACTS["at the name"], 0)
    ledger = make_ledger(world)
    assert (ledger["exposure"] == ledger["person"].map({person.identifier: person.exposure for person in world.people})).all()
    texts, people = [document.text for document in world.documents], {person.name for person in world.people}
    assert len(people) == 60
    assert len(set(world.unused)) == UNUSED
    assert not any(name in text for name in people for text in evaded(FACTS["at the name"]))
    assert not any(name in text for name in world.unused for text in texts)
    assert {word for name in world.unused for word in name.split()} <= {word for text in texts for word in text.split()}


def test_no_syllable_tells_a_stranger_from_a_person() -> None:
    generator = np.random.default_rng(0)
    groups = [Counter(word for name in made_names(4000, generator, strangers=which) for word in name.split()) for which in (False, True)]
    assert chi2_contingency([[group[word] for word in SYLLABLES] for group in groups]).pvalue > 0.001
    assert not set(made_names(5000, generator)) & set(made_names(5000, generator, strangers=True))
