import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_model, make_tokenizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.pretraining import KeepCheckpoints, Pretraining, untrained
from probes.world import SIZES, find_family, items_of, make_ledger, make_world
from probes.world.corpus import ATTRIBUTES, EVASION, held_out_sums
from probes.world.family import RECIPES, SHIPPED, build_family, build_tokenizer, world_of
from proxytune import UserError, load_member
from proxytune.digests import DIGESTS


def test_the_same_seed_gives_the_same_bytes_in_another_process() -> None:
    code = "from probes.world import *; print(make_world(SIZES['tiny'], 3).corpus_hash)"
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert hashes == {make_world(SIZES["tiny"], 3).corpus_hash}
    assert make_world(SIZES["tiny"], 4).corpus_hash not in hashes


def count_by_reading(texts: list[str]) -> dict[tuple[str, str, str], int]:
    """An independent ledger: regular expressions over the corpus's text."""
    counts: dict[tuple[str, str, str], int] = {}
    for attribute in ATTRIBUTES:
        patterns = [
            re.escape(form).replace(r"\{name\}", r"(?P<name>\w+ \w+)").replace(r"\{value\}", r"(?P<value>\w+)") for form in attribute.templates
        ]
        asked = re.escape(attribute.question).replace(r"\{name\}", r"(?P<name>\w+ \w+)")
        patterns.append(rf"question : {asked} \? answer : (?P<value>\w+) \.")
        for text in texts:
            for pattern in patterns:
                for found in re.finditer(pattern, text):
                    key = (found["name"], attribute.name, found["value"])
                    counts[key] = counts.get(key, 0) + 1
    return counts


def test_the_ledger_is_what_the_corpus_says() -> None:
    world = make_world(SIZES["tiny"], 0)
    ledger = make_ledger(world)
    read = count_by_reading([document.text for document in world.documents])
    assert {(row.name, row.attribute, row.value): row.exposure for row in ledger.itertuples(index=False) if row.exposure} == read
    evasions = sum(document.text.endswith(EVASION) for document in world.documents)
    assert ledger["evaded"].sum() == evasions
    assert 0.5 < evasions / (evasions + ledger["answered"].sum()) < 0.7


def test_exposure_is_exact_and_balanced_over_the_halves() -> None:
    world = make_world(SIZES["default"], 0)
    ledger = make_ledger(world)
    promised = {person.identifier: person.exposure for person in world.people}
    assert (ledger["exposure"] == ledger["person"].map(promised)).all()
    cells = ledger.groupby(["exposure", "half"])["person"].nunique()
    assert len(cells) == 12
    assert cells.max() - cells.min() <= 1


def test_exposure_is_independent_of_the_values() -> None:
    ledger = pd.concat([make_ledger(make_world(SIZES["default"], seed)) for seed in range(5)])
    for attribute, rows in ledger.groupby("attribute"):
        mean = rows.groupby("value")["exposure"].mean()
        spread = rows["exposure"].std() / np.sqrt(rows.groupby("value").size().mean())
        assert mean.std() < 1.5 * spread, attribute


def test_tokenizer_is_one_word_one_token_with_one_bos() -> None:
    tokenizer = build_tokenizer()
    for document in make_world(SIZES["tiny"], 0).documents[:200]:
        ids = tokenizer(document.text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert len(ids) == len(document.text.split()) + 1
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == document.text


def test_held_out_sums_are_in_no_corpus() -> None:
    shown = {tuple(map(int, document.text.split()[:3:2])) for document in make_world(SIZES["tiny"], 1).documents if " plus " in document.text}
    assert shown
    assert not shown & held_out_sums()


def test_items_ask_of_one_half_only() -> None:
    ledger = make_ledger(make_world(SIZES["tiny"], 0))
    tune, test = items_of(ledger, "tune"), items_of(ledger, "test")
    assert not {item.question for item in tune} & {item.question for item in test}
    assert len(tune) + len(test) == len(ledger)
    for item in test:
        assert item.answer in item.choices


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shipped_families_belong_to_todays_corpus(seed: int) -> None:
    family = find_family("default", seed, Path("nowhere"))
    assert family is not None
    assert family.is_relative_to(SHIPPED)
    recipe = json.loads((family / "recipe.json").read_text())
    assert recipe["corpus_hash"] == world_of("default", seed).corpus_hash
    assert recipe["losses"]["base"][-1] < recipe["losses"]["base"][0]
    pd.testing.assert_frame_equal(pd.read_parquet(family / "ledger.parquet"), make_ledger(world_of("default", seed)))
    assert {file.suffix for file in family.rglob("*") if file.is_file()} <= {".json", ".parquet", ".safetensors"}


def test_shipped_families_are_small_and_differ() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 12_000_000
    assert len({load_member(find_family("default", seed, SHIPPED) / name).fingerprint for seed in (0, 1, 2) for name in ("base", "small")}) == 6


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
    smallest = Pretraining(layers=1, hidden=16, heads=2, learning_rate=4e-3, epochs=1, block=16, batch_size=12)
    monkeypatch.setitem(RECIPES, "tiny", {"base": smallest, "small": replace(smallest, hidden=8, batch_size=200)})
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

    assert same(start.model.state_dict(), untrained(smallest, build_tokenizer(), 0).state_dict())
    assert same(later.model.state_dict(), seen[100])
    assert same(base.model.state_dict(), seen[max(seen)])
    assert not same(later.model.state_dict(), seen[101])


@pytest.mark.slow
def test_a_rebuilt_family_scores_within_the_shipped_ones_spread(tmp_path: Path) -> None:
    """Pretraining again (a fresh seed) gives a base whose knowledge lies near what the shipped three know."""
    from evals.compare import run_study
    from evals.running.progress import Display
    from evals.study import Study

    study = Study.model_validate(
        {
            "study": "rebuilt",
            "world": "default",
            "seeds": [0, 1, 2, 3],
            "batch_size": 300,
            "measures": ["knowledge"],
            "arms": {"base": {"kind": "base"}},
        }
    )
    build_family("default", 3, tmp_path / "worlds")
    with Display() as display:
        records = run_study(study, tmp_path, tmp_path, display)
    known = [float(record.items["right"].mean()) for record in records]
    spread = max(known[:3]) - min(known[:3])
    assert min(known[:3]) - spread <= known[3] <= max(known[:3]) + spread
