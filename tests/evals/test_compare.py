"""A whole study on the tiny world: the same bytes whether run at once, twice, or killed and started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from evals.verdicts import verdict_rows
from helpers import STUDY, make_model, make_tokenizer, place_world, run_in_process

from evals.display.render import render
from evals.records import Record, read_record, write_record
from evals.results.summary import summarize
from evals.study import Study, load_study
from proxytune.digests import DIGESTS
from proxytune.errors import UserError


def write_study(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "evals.cli", *map(str, arguments)]


@pytest.fixture(scope="module")
def unbroken(tiny_family: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record], dict[str, Any]]:
    out = place_world(tiny_family, tmp_path_factory.mktemp("unbroken"))
    study = Study.model_validate(STUDY)
    records = run_in_process(study, out)
    return out, records, summarize(study, records)


def rows(results: dict[str, Any], measure: str) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in results["rows"] if row["measure"] == measure}


def test_every_arm_has_every_measure(unbroken: tuple[Path, list[Record], dict[str, Any]]) -> None:
    results = unbroken[2]
    arms = {"base", "expert", "proxy@0", "proxy@1", "full", "lora"}
    assert set(rows(results, "task")) == set(rows(results, "knowledge")) == arms
    for measure in ("forgetting/k=30", "forgetting/question/k=3", "forgetting/choice/k=0"):
        assert set(rows(results, measure)) == arms - {"base"}
    assert {entry["arm"] for entry in results["gap_closed"]} == arms - {"base", "full"}
    assert {entry["arm"] for entry in results["exposure"]} == {"untrained", "base", "full", "lora"}
    assert {entry["arm"] for entry in results["erosion"]} == {"full", "lora"}
    for row in results["rows"]:
        assert row["low"] <= row["value"] <= row["high"]


def test_values_are_those_of_the_records_items(unbroken: tuple[Path, list[Record], dict[str, Any]]) -> None:
    _, records, results = unbroken
    for record in records:
        if record.measurement == "task":
            exposed = record.items[record.items["popularity"] > 0]
            row = rows(results, "task")[record.arm]
            assert row["value"] == pytest.approx(exposed["right"].mean(), abs=1e-6)
            assert (row["n"], row["unparsed"]) == (len(exposed), exposed["unparsed"].sum())


def test_alpha_zero_answers_as_the_base_and_forgets_nothing(unbroken: tuple[Path, list[Record], dict[str, Any]]) -> None:
    _, records, results = unbroken
    texts = {(record.arm, record.measurement): record.items["text"].tolist() for record in records if "text" in record.items}
    for measurement in ("task", "statement", "question", "choice"):
        assert texts["proxy@0", measurement] == texts["base", measurement]
    assert texts["proxy@1", "task"] != texts["base", "task"]
    assert all(
        row["value"] == 0 for measure in ("forgetting/k=30", "forgetting/k=3") for arm, row in rows(results, measure).items() if arm == "proxy@0"
    )


def erosion(results: dict[str, Any], block: str) -> dict[str, dict[str, Any]]:
    wanted = {"block": block, "site": "residual", "place": "last"}
    return {row["arm"]: row for row in results["erosion"] if wanted.items() <= row.items()}


def test_identical_states_change_by_exactly_zero_and_a_planted_erosion_is_found(unbroken: tuple[Path, list[Record], dict[str, Any]]) -> None:
    _, records, _ = unbroken
    study = Study.model_validate(STUDY)
    base = next(record for record in records if (record.arm, record.measurement) == ("base", "states"))
    same = [replace(r, items=base.items) if r.measurement == "states" else r for r in records]
    for block in ("low", "middle", "high"):
        for row in erosion(summarize(study, same), block).values():
            assert (row["value"], row["low"], row["high"]) == (0.0, 0.0, 0.0)
    familiar = base.items["popularity"] == base.items["popularity"].max()
    planted = base.items.copy()
    planted.loc[familiar, "effective_rank/residual/last/1"] -= 0.01
    planted_records = [replace(r, items=planted) if (r.arm, r.measurement) == ("full", "states") else r for r in same]
    harmed = summarize(study, planted_records)
    assert erosion(harmed, "low")["full"]["value"] == pytest.approx(-0.01, abs=1e-6)
    assert erosion(harmed, "high")["full"]["value"] == 0.0
    assert harmed["verdicts"] == []  # too little was asked for one
    several = [replace(r, seed=seed, items=_a_little_other(r, seed)) for seed in range(3) for r in planted_records]
    for these, expected in ((several, ("holds", "fails")), (planted_records, ("cannot tell", "cannot tell"))):  # one seed is never judged
        states = {row["arm"]: {clause["clause"]: clause["state"] for clause in row["clauses"]} for row in verdict_rows(Found(study, these), [])}
        assert (states["full"]["density"], states["lora"]["density"]) == expected


def _a_little_other(record: Record, seed: int) -> pd.DataFrame:
    """As another seed's: states of a tuning that ended a little elsewhere."""
    column = "effective_rank/residual/last/1"
    return record.items.assign(**{column: record.items[column] + 1e-6 * seed}) if record.measurement == "states" else record.items


def test_rows_of_different_protocols_cannot_stand_together(unbroken: tuple[Path, list[Record], dict[str, Any]]) -> None:
    _, records, _ = unbroken
    spoiled = [replace(r, protocol="other") if (r.arm, r.measurement) == ("full", "task") else r for r in records]
    with pytest.raises(UserError, match=r"task: arms base and full were asked differently"):
        summarize(Study.model_validate(STUDY), spoiled)


def test_every_format_renders_and_figures_are_drawn(unbroken: tuple[Path, list[Record], dict[str, Any]], tmp_path: Path) -> None:
    _, records, results = unbroken
    assert json.loads(render(results, "json")) == results
    for form in ("table", "markdown", "latex"):
        text = render(results, form)
        assert all(arm in text.replace("\\", "") for arm in ("proxy@1", "lora", "unchanged by construction"))
    for figure in draw_figures(Study.model_validate(STUDY), records, results, tmp_path):
        assert figure.stat().st_size > 10_000


def test_two_runs_and_the_command_line_give_the_same_bytes(
    unbroken: tuple[Path, list[Record], dict[str, Any]], tiny_family: Path, tmp_path: Path
) -> None:
    """Killed with SIGKILL in three places and started again: the same table, and no finished record made again."""
    study, out = write_study(tmp_path), place_world(tiny_family, tmp_path / "out")
    finished: dict[Path, int] = {}
    for needed in (1, 6, 14):
        process = subprocess.Popen(command("compare", study, "--out", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list((out / "records").glob("*.parquet"))) < needed and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
        finished |= {record: record.stat().st_mtime_ns for record in (out / "records").glob("*.parquet") if record not in finished}
    done = subprocess.run(command("compare", study, "--out", out, "--format", "json"), capture_output=True, text=True, check=True)
    assert done.stdout.rstrip("\n") == render(unbroken[2], "json")
    assert (out / "results.json").read_text() == done.stdout
    assert {record: record.stat().st_mtime_ns for record in finished} == finished
    assert "from its record" in done.stderr


def test_a_damaged_record_is_made_again(unbroken: tuple[Path, list[Record], dict[str, Any]], tmp_path: Path) -> None:
    out = Path(shutil.copytree(unbroken[0], tmp_path / "out"))
    victims = sorted((out / "records").glob("*.parquet"))[:3]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(victims[1].read_bytes()[:-9])
    victims[2].unlink()
    study = Study.model_validate(STUDY)
    assert render(summarize(study, run_in_process(study, out)), "json") == render(unbroken[2], "json")


def test_a_torn_or_flipped_record_is_no_record_or_the_same(tmp_path: Path) -> None:
    """Whatever is cut off, and whichever byte of the data is changed: never a wrong number."""
    frame = pd.DataFrame({"right": np.random.default_rng(0).random(200) < 0.5, "value": np.random.default_rng(1).random(200)})
    write_record(tmp_path, "whole", frame, {"arm": "base"})
    whole = (tmp_path / "whole.parquet").read_bytes()
    generator = np.random.default_rng(2)
    damaged = [whole[:cut] for cut in range(0, len(whole), 97)]
    for place in generator.integers(len(whole), size=150):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(generator.integers(8))
        damaged.append(bytes(changed))
    lost = 0
    for content in damaged:
        (tmp_path / "torn.parquet").write_bytes(content)
        found = read_record(tmp_path, "torn")
        lost += found is None
        if found is not None and list(found[0].columns) == list(frame.columns):
            pd.testing.assert_frame_equal(found[0], frame)
    assert lost > 50


def test_other_weights_and_other_items_are_other_records(
    unbroken: tuple[Path, list[Record], dict[str, Any]], tiny_family: Path, tmp_path: Path
) -> None:
    """The key is of the weights themselves: the same path with changed weights must not find the old record."""
    out = Path(shutil.copytree(unbroken[0], tmp_path / "out"))
    study = Study.model_validate(STUDY | {"measures": ["task"], "arms": {"base": {"kind": "base"}}})
    count = len(list((out / "records").glob("*")))
    before = run_in_process(study, out)
    assert len(list((out / "records").glob("*"))) == count
    base = out / "worlds" / "tiny" / "seed-0" / "base"
    model = type(make_model()).from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(base)
    for digests in base.parent.rglob(DIGESTS):
        digests.unlink()  # with them it would be a damaged family, which is built again
    run_in_process(study, out)
    assert len(list((out / "records").glob("*"))) == count + 1
    assert before[0].protocol != run_in_process(study.model_copy(update={"measures": ("knowledge",)}), out)[0].protocol


# --- real input: folders and files, and the mistakes people make with them ---


def save_model(folder: Path, swapped: bool = False, tokenizer: bool = True, layers: int = 2) -> Path:
    make_model(layers=layers).save_pretrained(folder)
    if tokenizer:
        make_tokenizer(swapped=swapped).save_pretrained(folder)
    return folder


def write_real_study(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_model(folder / "base", layers=3)
    save_model(folder / "small")
    items = [
        {"question": f"w{i} w{i + 1}", "statement": f"w{i}", "answer": f"w{i + 2}", "choices": [f"w{i + 2}", f"w{i + 3}"], "popularity": i}
        for i in range(3, 43)
    ]
    for name, chosen in (("train", items[:20]), ("test", items[20:]), ("knowledge", items[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in chosen))
    study = {key: value for key, value in STUDY.items() if key != "world"} | {
        "models": {"base": "base", "small": "small"},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "knowledge": "knowledge.jsonl", "prompt": "{question}", "answer": "choose"},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return path


def test_real_checkpoints_in_folders(tmp_path: Path) -> None:
    study, folder = load_study(write_real_study(tmp_path / "study"))
    results = summarize(study, run_in_process(study, tmp_path / "out", folder))
    assert {row["measure"] for row in results["rows"]} >= {"task", "knowledge", "forgetting/popularity=low"}
    assert {row["arm"] for row in results["erosion"]} == {"full", "lora"}


def test_a_given_expert_is_used(tmp_path: Path) -> None:
    arms = {"base": {"kind": "base"}, "expert": {"kind": "expert", "path": "small"}, "proxy": {"kind": "proxy", "alpha": [1.0]}}
    study, folder = load_study(write_real_study(tmp_path / "study", arms=arms, measures=["task"]))
    records = {record.arm: record.items["text"].tolist() for record in run_in_process(study, tmp_path / "out", folder)}
    assert records["proxy@1"] == records["base"]
    assert records["expert"] != records["base"]


def break_weights(folder: Path) -> None:
    model = make_model(layers=3)
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] = torch.nan
    model.save_pretrained(folder)


def spoil_file(name: str, content: str) -> Any:
    return lambda folder: (folder / name).write_text(content)


MISTAKES: dict[str, tuple[Any, str]] = {
    "missing file": (lambda folder: (folder / "train.jsonl").unlink(), "data.train: there is no file"),
    "empty data": (spoil_file("test.jsonl", ""), "data.test: .* holds no items"),
    "test items in the training data": (
        lambda folder: shutil.copy(folder / "train.jsonl", folder / "test.jsonl"),
        "data.test: 20 test questions are also in train",
    ),
    "vocabularies that differ": (lambda folder: save_model(folder / "small", swapped=True), "models.small: its vocabulary differs .* id 7"),
    "a base without a tokenizer": (
        lambda folder: [file.unlink() for file in (folder / "base").glob("tokenizer*")],
        "models.base: no tokenizer could be loaded",
    ),
    "a folder without a model": (lambda folder: (folder / "base" / "model.safetensors").unlink(), "models.base: no causal language model"),
    "a model that is nowhere": (lambda folder: shutil.rmtree(folder / "base"), "models.base: no tokenizer could be loaded from 'base'"),
    "weights that are not numbers": (lambda folder: break_weights(folder / "base"), "models.base: the weights '.*' hold NaN or infinity"),
    "no popularity": (
        spoil_file("knowledge.jsonl", '{"question": "w3", "statement": "w3", "answer": "w4"}\n'),
        "popularity: .* every knowledge item",
    ),
    "no statement": (spoil_file("knowledge.jsonl", '{"question": "w3", "answer": "w4"}\n'), "data.knowledge: .* has no statement"),
    "choices missing": (spoil_file("test.jsonl", '{"question": "w45", "answer": "w4"}\n'), "data.test: .* has no choices"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(tmp_path: Path, mistake: str) -> None:
    spoil, words = MISTAKES[mistake]
    path = write_real_study(tmp_path / "study")
    spoil(tmp_path / "study")
    study, folder = load_study(path)
    with pytest.raises(UserError, match=words) as caught:
        summarize(study, run_in_process(study, tmp_path / "out", folder))
    assert "\n" not in str(caught.value)


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out: .* cannot be written"):
        run_in_process(Study.model_validate(STUDY), tmp_path / "file" / "out")


def test_the_command_line_prints_one_line_and_no_traceback(tmp_path: Path) -> None:
    failed = subprocess.run(command("compare", tmp_path / "none.yaml"), capture_output=True, text=True, env=os.environ)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.startswith("proxytune: error: study: there is no file")
    assert failed.stderr.count("\n") == 1
