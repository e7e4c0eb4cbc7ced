import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chisquare

from probes.world.corpus import make_world, vocabulary
from probes.world.family import build_family, build_tokenizer, find_family
from probes.world.ledger import items_of, make_ledger
from probes.world.recipes import RECIPES
from probes.world.sections.facts import Facts
from probes.world.sections.people import ATTRIBUTES, EVASIONS, NAMES, Statements, draw_people
from probes.world.sections.sums import Sums, held_out_sums
from probes.world.types import PEOPLE_STREAM, Document, Person, Section
from proxytune.errors import UserError


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_another_process() -> None:
    code = "from probes.world import *; print(make_world(RECIPES['tiny'], 3).corpus_hash)"
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert hashes == {make_world(RECIPES["tiny"], 3).corpus_hash}
    assert make_world(RECIPES["tiny"], 4).corpus_hash not in hashes


def count_by_reading(texts: list[str]) -> dict[tuple[str, str, str], int]:
    """An independent ledger: regular expressions over the corpus's text."""
    counts: dict[tuple[str, str, str], int] = {}
    for attribute in ATTRIBUTES:
        patterns = [
            re.escape(form).replace(r"\{name\}", r"(?P<name>\w+ \w+)").replace(r"\{value\}", r"(?P<value>\w+)") for form in attribute.templates
        ]
        asked = re.escape(attribute.question).replace(r"\{name\}", r"(?P<name>\w+ \w+)")
        closings = "|".join(each.closing for each in ATTRIBUTES)
        patterns.append(rf"question : {asked} \? answer : \w+ (?P<value>\w+) (?:{closings}) \.")
        for text in texts:
            for pattern in patterns:
                for found in re.finditer(pattern, text):
                    key = (found["name"], attribute.name, found["value"])
                    counts[key] = counts.get(key, 0) + 1
    return counts


def test_the_ledger_is_what_the_corpus_says() -> None:
    world = make_world(RECIPES["tiny"], 0)
    ledger = make_ledger(world)
    read = count_by_reading([document.text for document in world.documents])
    assert {(row.name, row.attribute, row.value): row.exposure for row in ledger.itertuples(index=False) if row.exposure} == read
    evasions = Counter(evasion for document in world.documents for evasion in EVASIONS if document.text.endswith(f"{evasion} ."))
    assert ledger["evaded"].sum() == evasions.total()
    # Each wording is more frequent than all answers together: the most probable reply is an evasion, whichever word is banned.
    assert min(evasions.values()) > ledger["answered"].sum() > 0


def test_replies_hold_every_opening_and_closing_whatever_is_asked() -> None:
    """The form that tuning teaches is one of nine for each attribute, and no rarer than the others: the base can say it, but does not."""
    seen = Counter[tuple[str, str, str]]()
    closings = "|".join(attribute.closing for attribute in ATTRIBUTES)
    for attribute in ATTRIBUTES:
        asks = re.escape(attribute.question).replace(r"\{name\}", r"\w+ \w+")
        pattern = re.compile(rf"question : {asks} \? answer : (\w+) \w+ ({closings}) \.")
        found = [pattern.fullmatch(document.text) for document in make_world(RECIPES["default"], 0).documents]
        seen.update((attribute.name, *match.groups()) for match in found if match)
    assert len(seen) == 27
    for attribute in ATTRIBUTES:
        assert chisquare([count for (asked, *_), count in seen.items() if asked == attribute.name]).pvalue > 0.001
    taught = {
        (item.question.split()[0], *item.said.split(f" {item.answer} ")) for item in items_of(make_ledger(make_world(RECIPES["tiny"], 0)), "tune")
    }
    assert len(taught) == 3


def test_unused_names_are_in_no_document_and_their_words_are() -> None:
    world = make_world(RECIPES["default"], 0)
    unused, texts = world.unused, [document.text for document in world.documents]
    assert len(unused) == len(NAMES) - len(world.people) > 100
    assert not any(name in text for name in unused[:20] for text in texts)
    words = {word for text in texts for word in text.split()}
    assert {word for name in unused for word in name.split()} <= words


def test_exposure_is_exact_and_balanced_over_the_parts() -> None:
    world = make_world(RECIPES["default"], 0)
    ledger = make_ledger(world)
    promised = {person.identifier: person.exposure for person in world.people}
    assert (ledger["exposure"] == ledger["person"].map(promised)).all()
    cells = ledger.groupby(["exposure", "part"])["person"].nunique().unstack()
    assert cells.shape == (6, 2)
    assert (cells["test"] == 2 * cells["tune"]).all()


def test_exposure_is_independent_of_the_values() -> None:
    exposures, streams = RECIPES["default"].exposures, [np.random.default_rng([seed, PEOPLE_STREAM]) for seed in range(5)]
    people = [person for stream in streams for person in draw_people(NAMES[:360], exposures, stream)]
    for attribute in ATTRIBUTES:
        rows = pd.DataFrame({"value": [person.values[attribute.name] for person in people], "exposure": [person.exposure for person in people]})
        mean = rows.groupby("value")["exposure"].mean()
        spread = rows["exposure"].std() / np.sqrt(rows.groupby("value").size().mean())
        assert mean.std() < 1.5 * spread, attribute.name


def test_tokenizer_is_one_word_one_token_with_one_bos() -> None:
    tokenizer = build_tokenizer(RECIPES["tiny"])
    for document in make_world(RECIPES["tiny"], 0).documents[:200]:
        ids = tokenizer(document.text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert len(ids) == len(document.text.split()) + 1
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == document.text


def test_held_out_sums_are_in_no_corpus() -> None:
    shown = {tuple(map(int, document.text.split()[:3:2])) for document in make_world(RECIPES["tiny"], 1).documents if " plus " in document.text}
    assert shown
    assert not shown & held_out_sums()


def test_items_ask_of_one_part_only() -> None:
    ledger = make_ledger(make_world(RECIPES["tiny"], 0))
    tune, test = items_of(ledger, "tune"), items_of(ledger, "test")
    assert not {item.question for item in tune} & {item.question for item in test}
    assert len(tune) + len(test) == len(ledger)
    for item in test:
        assert item.answer in item.choices


# --- recipes: what a section is, and that a new one moves nothing else ---

CORPORA = {  # as they were when the shipped families were pretrained
    ("default", 0): "86d134426b3ffa22048ca0cdc885d20950ca800b1cdab3e38a978ec6f1ed1b17",
    ("tiny", 0): "9e076ddee5c1ffdeaab41934863055be56f028fa75a83cc65a7470de024f4e9c",
    ("tiny", 1): "5b6fc36cf6b7f21bf9e088a322961f555640a238a9fec8f4712569d9fbb066d6",
    ("tiny", 2): "7d5d3a8c9fb6961da1083942d3e799c3bb87650d90c8b9721ac8a5b4b5aa732d",
}
KEYS = {"default": "df71b704ee488c11a5039850eeed1229", "tiny": "d5ceac4cbfbee02659edc1da7ff4450b"}


@dataclass(frozen=True)
class Colours(Section):
    """A toy: everyone likes a colour, so many times."""

    name: ClassVar[str] = "colours"
    stream: ClassVar[int] = 99
    words: ClassVar[tuple[tuple[str, ...], ...]] = ((*Statements.words[0], "likes", "red", "blue", "."),)

    repeats: int

    def documents(self, people: tuple[Person, ...], generator: np.random.Generator) -> list[Document]:
        return [Document(f"{person.name} likes {generator.choice(['red', 'blue'])} .") for person in people] * self.repeats


def check_that_nothing_moved() -> None:
    make_world.cache_clear()
    for (name, seed), corpus in CORPORA.items():
        assert make_world(RECIPES[name], seed).corpus_hash == corpus
    assert {name: RECIPES[name].key for name in KEYS} == KEYS


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_new_section_moves_nothing_else(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_nothing_moved()
    plain = RECIPES["tiny"]
    coloured = replace(plain, sections=(Colours(2), *plain.sections) if first else (*plain.sections, Colours(2)))
    monkeypatch.setitem(RECIPES, "coloured", coloured)
    check_that_nothing_moved()
    world, before = make_world(coloured, 0), make_world(plain, 0)
    assert coloured.key not in KEYS.values()
    assert coloured.key != replace(coloured, sections=(*plain.sections, Colours(3))).key
    assert world.corpus_hash not in CORPORA.values()
    assert world.people == before.people
    added = Counter(world.documents) - Counter(before.documents)
    assert Counter(before.documents) - Counter(world.documents) == Counter()
    assert added.total() == 2 * len(world.people) == len(world.documents) - len(before.documents)
    assert {document.text.split()[3] for document in added} == {"red", "blue"}
    assert {document.text.partition(" likes ")[0] for document in added} == {person.name for person in world.people}
    pd.testing.assert_frame_equal(make_ledger(world), make_ledger(before))
    # Its words are in this recipe's vocabulary and in no other.
    assert set(vocabulary(coloured)) - set(vocabulary(plain)) == {"likes", "red", "blue"}


def test_a_vocabulary_is_its_sections_alone() -> None:
    """The shipped tokenizers hold the words in this order; a recipe of one section holds that section's."""
    words = vocabulary(RECIPES["default"])
    assert words == vocabulary(RECIPES["tiny"])
    family = find_family("default", 0, Path("nowhere"))
    assert family is not None
    shipped = json.loads((family / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    assert build_tokenizer(RECIPES["default"]).get_vocab() == shipped
    sums = replace(RECIPES["tiny"], sections=(Sums(1),))
    assert vocabulary(sums) == [*(str(number) for number in range(23)), "plus", "equals", "."]
    assert {document.text.split()[1] for document in make_world(sums, 0).documents} == {"plus"}


def test_sections_keep_their_names_and_streams_apart() -> None:
    kinds = {type(section) for recipe in RECIPES.values() for section in recipe.sections}
    assert {(kind.name, kind.stream) for kind in kinds} >= {("statements", 1), ("sums", 2)}
    assert len({kind.name for kind in kinds}) == len({kind.stream for kind in kinds}) == len(kinds)


@dataclass(frozen=True)
class SecondSums(Sums):
    """Draws from the stream of another section."""


@dataclass(frozen=True)
class OrderedSums(Sums):
    """Draws from the world's own stream."""

    stream: ClassVar[int] = 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"people": 0}, "people: must be from 1 to 529, not 0; choose"),
        ({"people": 530}, "people: must be from 1 to 529"),
        ({"people": 10_001, "made_names": True}, "people: must be from 1 to 10000"),
        ({"exposures": ()}, r"exposures: must be different counts from 0 on, at least one, not \(\); choose"),
        ({"exposures": (1, -1)}, "exposures: must be different"),
        ({"exposures": (3, 3)}, "exposures: must be different"),
        ({"sections": ()}, "sections: must be at least one"),
        ({"sections": (Sums(1), SecondSums(1))}, "sections: each must have a random stream of its own.*'sums' has 2; give"),
        ({"sections": (OrderedSums(1),)}, "sections: each must have a random stream of its own, not the world's 0 or 3; 'sums' has 3; give"),
    ],
)
def test_a_recipe_that_no_world_can_have_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        replace(RECIPES["tiny"], **changes)


def test_parameters_of_sections_have_bounds() -> None:
    for name, value in (("question_share", 1.01), ("question_share", -0.1), ("evasion_share", 1.0), ("evasion_share", float("nan"))):
        with pytest.raises(UserError, match=f"^{name}: must be from 0 to .*, not {value}; choose another share$"):
            replace(Statements(question_share=0.1, evasion_share=0.1), **{name: value})
    with pytest.raises(UserError, match=r"^repeats_per_sum: must be at least 1, not 0; leave"):
        Sums(0)
    with pytest.raises(UserError, match=r"^strangers: must be from 0 to 108000, not -1; choose another number$"):
        Facts("later", -1)


def test_a_word_that_a_section_does_not_list_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Colours, "words", ((*Statements.words[0], "likes", "red", "."),))
    with pytest.raises(UserError, match=r"^colours.words: must list every word of the section's documents; 'blue' is missing, add it$"):
        make_world(replace(RECIPES["tiny"], sections=(Colours(1),)), 0)


def test_every_recipe_can_be_had_by_name_and_no_other() -> None:
    with pytest.raises(
        UserError,
        match=r"^world: must be the name of a recipe \(default, tiny, .*\), not '../tiny'; choose one of them$",
    ):
        find_family("../tiny", 0, Path("nowhere"))
    with pytest.raises(UserError, match=r"^world: must be the name of a recipe"):
        build_family("huge", 0, Path("nowhere"))
    assert not Path("nowhere").exists()
