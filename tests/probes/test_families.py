"""Families of worlds: built, shipped, found and refused."""

import json
import logging
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_model, make_tokenizer
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.pretraining import KeepCheckpoints, Pretraining, untrained
from probes.knowledge.candidates import known
from probes.world.corpus import make_world
from probes.world.family import SHIPPED, build_family, build_tokenizer, family_folder, find_family
from probes.world.ledger import items_of, make_ledger
from probes.world.recipes import RECIPES, Recipe
from probes.world.sections.sums import Sums
from proxytune.digests import DIGESTS, is_whole
from proxytune.errors import UserError
from proxytune.member import load_member

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
