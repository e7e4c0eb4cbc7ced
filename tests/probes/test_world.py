import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_model, make_tokenizer
from safetensors.torch import load_file
from scipy.stats import chi2_contingency, chisquare
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.pretraining import KeepCheckpoints, Pretraining, untrained
from probes.knowledge.candidates import known
from probes.world.corpus import UNUSED, make_world, vocabulary
from probes.world.family import SHIPPED, build_family, build_tokenizer, family_folder, find_family
from probes.world.ledger import items_of, make_ledger
from probes.world.recipes import RECIPES, Recipe
from probes.world.sections.facts import NOBODY, SYLLABLES, Facts, made_names
from probes.world.sections.people import ATTRIBUTES, EVASIONS, NAMES, Statements, draw_people
from probes.world.sections.sums import Sums, held_out_sums
from probes.world.types import PEOPLE_STREAM, Document, Person, Section
from proxytune.digests import DIGESTS, is_whole
from proxytune.errors import UserError
from proxytune.member import load_member


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


# --- facts about people with made names ---


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


# --- families ---

SHIPPED_SEEDS = range(10)


@pytest.fixture
def smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family of the tiny corpus that takes a second."""
    pretraining = Pretraining(layers=1, hidden=8, heads=1, learning_rate=1e-2, epochs=1, block=24, batch_size=500)
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], base=pretraining, small=pretraining))


@pytest.mark.usefixtures("smallest")
def test_a_family_of_another_recipe_is_refused_and_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = build_family("tiny", 0, tmp_path)
    made = json.loads((family / "recipe.json").read_text())
    assert made["recipe"] == RECIPES["tiny"].key
    assert made["size"]["name"] == "tiny"
    assert made["size"]["sections"][1] == {"name": "sums", "stream": 2, "repeats_per_sum": 1}
    kept = (family / "base").stat().st_ino
    assert build_family("tiny", 0, tmp_path) == family == find_family("tiny", 0, tmp_path)
    assert (family / "base").stat().st_ino == kept
    # Another corpus, other models, and the same bytes of both under another description.
    other = (
        replace(RECIPES["tiny"], exposures=(0, 2)),
        replace(RECIPES["tiny"], small=replace(RECIPES["tiny"].small, hidden=16)),
        replace(RECIPES["tiny"], sections=(RECIPES["tiny"].sections[0], RenamedSums(1))),
    )
    for recipe in other:
        monkeypatch.setitem(RECIPES, "tiny", recipe)
        with pytest.raises(
            UserError, match=r"^world: '.*seed-0' was made by another recipe of that name; build it again with 'proxytune world build'$"
        ):
            find_family("tiny", 0, tmp_path)
    build_family("tiny", 0, tmp_path)
    assert find_family("tiny", 0, tmp_path) == family
    assert json.loads((family / "recipe.json").read_text())["recipe"] == other[-1].key
    assert [place.name for place in family.parent.iterdir()] == ["seed-0"]


@dataclass(frozen=True)
class RenamedSums(Sums):
    """The same sums under another name."""

    name: ClassVar[str] = "additions"


@pytest.mark.usefixtures("smallest")
def test_a_family_from_before_recipes_had_a_key_goes_by_its_models_and_corpus(tmp_path: Path) -> None:
    family = build_family("tiny", 0, tmp_path)
    made = json.loads((family / "recipe.json").read_text())
    (family / DIGESTS).unlink()
    del made["recipe"]
    (family / "recipe.json").write_text(json.dumps(made))
    assert find_family("tiny", 0, tmp_path) == family
    made["models"]["small"]["epochs"] = 2
    (family / "recipe.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match="another recipe"):
        find_family("tiny", 0, tmp_path)


def build_slowly(recipe: Recipe, folder: Path, begun: Any, go_on: Any) -> None:
    """Builds the tiny family in a process of its own, and stands still within until it may go on."""

    class Watcher(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            begun.set()
            assert go_on.wait(60)

    RECIPES["tiny"] = recipe
    build_family("tiny", 0, folder, Watcher())


@pytest.mark.usefixtures("smallest")
@pytest.mark.parametrize("killed", [False, True], ids=["finished", "killed"])
def test_of_two_who_build_the_same_family_one_builds(tmp_path: Path, killed: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The second waits and takes what the first made, or builds where the first was killed."""
    processes = multiprocessing.get_context("spawn")
    begun, go_on = processes.Event(), processes.Event()
    first = processes.Process(target=build_slowly, args=(RECIPES["tiny"], tmp_path, begun, go_on))
    first.start()
    assert begun.wait(60)
    steps = []

    class Second(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            steps.append(first.is_alive())

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            """The second says that it waits: now the first ends, one way or the other."""
            if "another process is building" in record.getMessage():
                assert not (tmp_path / "tiny" / "seed-0").exists()
                os.kill(first.pid, signal.SIGKILL) if killed else go_on.set()

    handler = Handler()
    logging.getLogger("proxytune").addHandler(handler)
    try:
        began = time.monotonic()
        family = build_family("tiny", 0, tmp_path, Second())
        assert time.monotonic() - began < 60
    finally:
        logging.getLogger("proxytune").removeHandler(handler)
        first.kill()
        first.join()
    assert [record.getMessage() for record in caplog.records] == [f"another process is building '{family}'; waiting for it"]
    assert steps == ([False, False] if killed else [])
    assert is_whole(family)
    assert find_family("tiny", 0, tmp_path) == family
    assert [place.name for place in family.parent.iterdir()] == ["seed-0"]
    # Nobody has to wait any more: other seeds never had to.
    caplog.clear()
    build_family("tiny", 0, tmp_path)
    assert not caplog.records


def test_other_seeds_are_built_at_the_same_time(tmp_path: Path, smallest: None, caplog: pytest.LogCaptureFixture) -> None:
    class Inner(TrainerCallback):
        """Builds seed 1 while seed 0 is being built."""

        def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            built.append(build_family("tiny", 1, tmp_path))

    built: list[Path] = []
    build_family("tiny", 0, tmp_path, Inner())
    assert built == [tmp_path / "tiny" / "seed-1"] * 2
    assert not caplog.records


@pytest.mark.parametrize("seed", [SHIPPED_SEEDS[0], *(pytest.param(seed, marks=pytest.mark.slow) for seed in SHIPPED_SEEDS[1:])])
def test_shipped_families_belong_to_todays_corpus(seed: int) -> None:
    family = find_family("default", seed, Path("nowhere"))
    assert family is not None
    assert family.is_relative_to(SHIPPED)
    recipe = json.loads((family / "recipe.json").read_text())
    assert recipe["corpus_hash"] == make_world(RECIPES["default"], seed).corpus_hash
    assert recipe["losses"]["base"][-1] < recipe["losses"]["base"][0]
    pd.testing.assert_frame_equal(pd.read_parquet(family / "ledger.parquet"), make_ledger(make_world(RECIPES["default"], seed)))
    assert {file.suffix for file in family.rglob("*") if file.is_file()} <= {".json", ".parquet", ".safetensors"}
    for name in ("base", "small"):
        assert {weight.dtype for weight in load_file(family / name / "model.safetensors").values()} == {torch.bfloat16}


def test_shipped_families_are_small_and_differ() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 25_000_000
    weights = [family_folder("default", seed, SHIPPED) / name / "model.safetensors" for seed in SHIPPED_SEEDS for name in ("base", "small")]
    assert len({file.read_bytes() for file in weights}) == 2 * len(SHIPPED_SEEDS)


def test_a_family_of_another_corpus_is_refused(tiny_family: Path, tmp_path: Path) -> None:
    place = tmp_path / "tiny" / "seed-0"
    place.mkdir(parents=True)
    recipe = json.loads((tiny_family / "recipe.json").read_text())
    (place / "recipe.json").write_text(json.dumps(recipe | {"corpus_hash": "0" * 64}))
    with pytest.raises(UserError, match="another corpus"):
        find_family("tiny", 0, tmp_path)


@pytest.mark.parametrize(("last", "kept"), [(800, [0, 100, 200, 400]), (801, [0, 100, 200, 400, 800]), (1700, [0, 100, 200, 400, 800, 1600])])
def test_checkpoints_double_and_leave_the_last_step_out(tmp_path: Path, last: int, kept: list[int]) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    watcher, told = KeepCheckpoints(tmp_path, tokenizer), (TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl())
    watcher.on_train_begin(told[0], TrainerState(max_steps=last), told[1], model=model)
    for step in range(1, last + 1):
        watcher.on_step_end(told[0], TrainerState(global_step=step, max_steps=last), told[1], model=model)
    assert sorted(int(folder.name.removeprefix("step-")) for folder in tmp_path.iterdir()) == kept


def test_a_family_with_checkpoints_is_the_family_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smallest = Pretraining(layers=1, hidden=16, heads=2, learning_rate=4e-3, epochs=1, block=24, batch_size=12)
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], base=smallest, small=replace(smallest, hidden=8, batch_size=200)))
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Watcher(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
            seen.setdefault(state.global_step, {name: weight.clone() for name, weight in given["model"].state_dict().items()})

    without = build_family("tiny", 0, tmp_path / "without")
    kept = build_family("tiny", 0, tmp_path / "with", Watcher(), checkpoints=True)
    files = [file.relative_to(without) for file in without.rglob("*") if file.is_file() and file != without / DIGESTS]
    assert {"base", "small", "ledger.parquet", "recipe.json"} == {file.parts[0] for file in files}
    assert all((without / file).read_bytes() == (kept / file).read_bytes() for file in files)
    assert {folder.name for folder in (kept / "checkpoints").iterdir()} == {"step-0", "step-100"}
    # Each can be taken for the base, and holds what training held after so many steps.
    base, start, later = (load_member(kept / name) for name in ("base", "checkpoints/step-0", "checkpoints/step-100"))
    assert start.tokenizer.get_vocab() == later.tokenizer.get_vocab() == base.tokenizer.get_vocab()

    def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
        return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)

    def rounded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        return {name: weight.bfloat16().float() for name, weight in weights.items()}

    assert same(start.model.state_dict(), rounded(untrained(smallest, build_tokenizer(RECIPES["tiny"]), 0).state_dict()))
    assert same(later.model.state_dict(), rounded(seen[100]))
    assert same(base.model.state_dict(), rounded(seen[max(seen)]))
    assert not same(later.model.state_dict(), rounded(seen[101]))
    types = {weight.dtype for file in kept.rglob("model.safetensors") for weight in load_file(file).values()}
    assert types == {torch.bfloat16}


@pytest.mark.slow
def test_a_family_built_again_is_the_shipped_one_or_knows_as_much(tmp_path: Path) -> None:
    """The same bytes on the same type of machine. Elsewhere rounding differs; then its base knows about what the shipped eight know."""
    shipped = [family_folder("default", seed, SHIPPED) for seed in SHIPPED_SEEDS]
    rebuilt = build_family("default", 0, tmp_path)
    files = [Path(name) / "model.safetensors" for name in ("base", "small")]
    if all((rebuilt / file).read_bytes() == (shipped[0] / file).read_bytes() for file in files):
        return
    facts = [(load_member(family / "base"), items_of(pd.read_parquet(family / "ledger.parquet"), "test")) for family in (*shipped, rebuilt)]
    *known_by, known_again = [known(member, items).right.mean() for member, items in facts]
    assert known_again == pytest.approx(np.mean(known_by), abs=4 * np.std(known_by, ddof=1))
