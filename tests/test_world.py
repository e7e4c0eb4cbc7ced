import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probes.world import SIZES, find_family, items_of, make_ledger, make_world
from probes.world.corpus import ATTRIBUTES, EVASION, held_out_sums
from probes.world.family import SHIPPED, build_family, build_tokenizer, world_of
from proxytune import UserError, load_member


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


@pytest.mark.slow
def test_a_rebuilt_family_scores_within_the_shipped_ones_spread(tmp_path: Path) -> None:
    """Pretraining again (a fresh seed) gives a base whose knowledge lies near what the shipped three know."""
    from evals.compare import run_study
    from evals.progress import Display
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
