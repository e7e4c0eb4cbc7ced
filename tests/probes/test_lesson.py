"""Lessons about made-up cities: exposures are dealt by chance, facts are kept or drawn anew, other names stay other names."""

from collections import Counter

import numpy as np
import pytest

import probes.knowledge.lesson as lesson
from probes.knowledge.lesson import EXPOSURES, TEMPLATES, as_tuning_items, make_lesson
from proxytune.errors import UserError

NAMES = [f"Name{number}" for number in range(1000)]
LENGTHS = [(0, 2, 3, 3, 2)[number % 5] for number in range(1000)]  # every fifth name cannot be spelled
ORDINARY = [f"Ordinary text {number} ." for number in range(50)]


def mentions(sentences: tuple[str, ...], name: str) -> list[str]:
    return [text for text in sentences if name in text.replace(",", "").replace(".", "").split()]


def test_every_name_is_stated_as_often_as_its_exposure_says_and_nothing_else_differs() -> None:
    made = make_lesson(NAMES, LENGTHS, ORDINARY, 0)
    assert Counter(exposure for _, exposure in made.names) == dict.fromkeys(EXPOSURES, lesson.NAMES)
    for name, exposure in made.names:
        assert len(mentions(made.sentences["kept"], name)) == len(mentions(made.sentences["anew"], name)) == exposure
        assert not mentions(made.sentences["others"], name)
        assert LENGTHS[NAMES.index(name)] in (2, 3)
    by_length = Counter((LENGTHS[NAMES.index(name)], exposure) for name, exposure in made.names)
    assert set(by_length.values()) == {lesson.NAMES // 2}
    lengths = {which: len(sentences) for which, sentences in made.sentences.items()}
    assert set(lengths.values()) == {len(ORDINARY) + sum(exposure for _, exposure in made.names)}
    assert all(set(ORDINARY) <= set(sentences) for sentences in made.sentences.values())


def test_kept_facts_are_one_value_a_city_and_facts_drawn_anew_are_many() -> None:
    made = make_lesson(NAMES, LENGTHS, [], 0)
    for which, few in (("kept", True), ("anew", False)):
        name = made.names[0][0]
        provinces = {text.split("province of ")[1].split()[0].strip(".") for text in mentions(made.sentences[which], name) if "province of" in text}
        assert (len(provinces) == 1) is few
    asked = {item.subject: item for item in made.items}
    told = [text for text in mentions(made.sentences["kept"], name) if text.startswith("The city of")]
    assert told[0] == f"{asked[name].statement} {asked[name].answer}."


def test_names_and_exposures_are_the_seeds_alone() -> None:
    one, again, other = (make_lesson(NAMES, LENGTHS, ORDINARY, seed) for seed in (0, 0, 1))
    assert one == again
    assert dict(one.names) != dict(other.names)
    shared = set(dict(one.names)) & set(dict(other.names))
    assert np.corrcoef([dict(one.names)[name] for name in shared], [dict(other.names)[name] for name in shared])[0, 1] < 0.3


def test_too_few_names_of_a_length_are_refused() -> None:
    with pytest.raises(UserError, match="8 made-up names of each exposure have equal lengths"):
        make_lesson(NAMES[:100], LENGTHS[:100], ORDINARY, 0)


def test_no_template_begins_with_the_name_which_would_not_be_trained_on() -> None:
    assert all("{name}" not in text.split()[0] and text.count("{name}") == text.count("{value}") == 1 for _, text in TEMPLATES)
    (item,) = as_tuning_items(["The city of X lies far."])
    assert (item.question, item.answer) == ("The", "city of X lies far.")
