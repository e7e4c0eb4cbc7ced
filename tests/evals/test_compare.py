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
from helpers import STUDY, Unbroken, make_model, make_tokenizer, place_world, run_command, run_in_process

from evals.display.drawing import draw as draw_chart
from evals.display.render import draw
from evals.measures.density import Change
from evals.records import Record, read_record, write_record
from evals.results.recorded import Recorded
from evals.results.summary import Results, read_results, result_charts, result_tables, summarize
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


def rows(results: Results, measure: str) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in results.rows if row["measure"] == measure}


def test_every_arm_has_every_measure(unbroken: Unbroken) -> None:
    results = unbroken.results
    arms = {"base", "expert", "proxy@0", "proxy@1", "full", "lora"}
    assert set(rows(results, "task")) == set(rows(results, "knowledge")) == arms
    for measure in ("forgetting/k=30", "forgetting/question/k=3", "forgetting/choice/k=0"):
        assert set(rows(results, measure)) == arms - {"base"}
    assert {entry["arm"] for entry in results.compared["gap_closed"]} == arms - {"base", "full"}
    density = results.measures["density"]
    assert {entry.arm for entry in density.exposure} == {"untrained", "base", "full", "lora"}
    assert {entry.arm for entry in density.changes} == {"full", "lora"}
    for row in results.rows:
        assert row["low"] <= row["value"] <= row["high"]


def test_values_are_those_of_the_records_items(unbroken: Unbroken) -> None:
    records = [record for record in unbroken.finished.records if record.frame == "task"]
    assert len(records) == 6
    for record in records:
        exposed = record.items[record.items["popularity"] > 0]
        row = rows(unbroken.results, "task")[record.arm]
        assert row["value"] == pytest.approx(exposed["right"].mean(), abs=1e-6)
        assert (row["n"], row["unparsed"]) == (len(exposed), exposed["unparsed"].sum())


def test_alpha_zero_answers_as_the_base_and_forgets_nothing(unbroken: Unbroken) -> None:
    texts = {(record.arm, record.frame): record.items["text"].tolist() for record in unbroken.finished.records if "text" in record.items}
    for frame in ("task", "knowledge", "forgetting/question", "forgetting/choice"):
        assert texts["proxy@0", frame] == texts["base", frame]
    assert texts["proxy@1", "task"] != texts["base", "task"]
    for measure in ("forgetting/k=30", "forgetting/k=3"):
        assert rows(unbroken.results, measure)["proxy@0"]["value"] == 0


def eroded(study: Study, records: list[Record], block: str) -> dict[str, Change]:
    found = Recorded(study, records).summary("density").changes
    return {row.arm: row for row in found if (row.block, row.site, row.place) == (block, "residual", "last")}


def test_identical_states_change_by_exactly_zero_and_a_planted_erosion_is_found(unbroken: Unbroken) -> None:
    records = unbroken.finished.records
    study = Study.model_validate(STUDY)
    base = {record.frame: record.items for record in records if record.arm == "base"}
    same = [replace(r, items=base["states"]) if r.frame == "states" else r for r in records]
    for block in ("low", "middle", "high"):
        changes = eroded(study, same, block)
        assert set(changes) == {"full", "lora"}
        for row in changes.values():
            assert (row.change.value, row.change.low, row.change.high) == (0.0, 0.0, 0.0)
    popularity = base["prompts"]["popularity"].to_numpy()
    planted = base["states"].copy()
    familiar = np.tile(popularity == popularity.max(), len(planted) // len(popularity))
    planted.loc[_first_state(planted) & familiar, "value"] -= 0.01
    planted_records = [replace(r, items=planted) if (r.arm, r.frame) == ("full", "states") else r for r in same]
    assert eroded(study, planted_records, "low")["full"].change.value == pytest.approx(-0.01, abs=1e-6)
    assert eroded(study, planted_records, "high")["full"].change.value == 0.0
    assert "erosion" not in summarize(study, planted_records, unbroken.finished.costs).measures  # too little was asked for a verdict
    several = [replace(r, seed=seed, items=_a_little_other(r, seed)) for seed in range(3) for r in planted_records]
    for these, expected in ((several, ("holds", "fails")), (planted_records, ("cannot tell", "cannot tell"))):  # one seed is never judged
        verdicts = Recorded(study, these).summary("erosion").verdicts
        states = {row.arm: {clause.clause: clause.state for clause in row.clauses} for row in verdicts}
        assert (states["full"]["density"], states["lora"]["density"]) == expected


def _first_state(frame: pd.DataFrame) -> pd.Series:
    """The rows of the effective rank of the residual stream at the last token, after the first layer."""
    return (frame[["metric", "site", "place"]].astype(str) == ["effective_rank", "residual", "last"]).all(axis=1) & (frame["state"] == 1)


def _a_little_other(record: Record, seed: int) -> pd.DataFrame:
    """As another seed's: states of a tuning that ended a little elsewhere."""
    if record.frame != "states":
        return record.items
    return record.items.assign(value=record.items["value"] + 1e-6 * seed * _first_state(record.items))


def test_rows_of_different_protocols_cannot_stand_together(unbroken: Unbroken) -> None:
    spoiled = [replace(r, protocol="other") if (r.arm, r.frame) == ("full", "task") else r for r in unbroken.finished.records]
    with pytest.raises(UserError, match=r"task: arms base and full were asked differently"):
        summarize(Study.model_validate(STUDY), spoiled, unbroken.finished.costs)


def test_every_format_renders_and_figures_are_drawn(unbroken: Unbroken, tmp_path: Path) -> None:
    results = unbroken.results
    for row, written in zip(results.rows, json.loads(results.json())["rows"], strict=True):
        assert written == pytest.approx(row, abs=1e-6)
    for form in ("table", "markdown", "latex", "html"):
        text = draw(result_tables(results), form, 160)
        assert all(arm in text.replace("\\", "") for arm in ("proxy@1", "lora", "unchanged by construction"))
    figures = [path for chart in result_charts(results) for path in draw_chart(chart, tmp_path)]
    assert {path.stem for path in figures} == {"frontier", "knowledge-by-exposure", "density-names", "density-change", "density-by-layer"}
    assert all(path.stat().st_size > 10_000 for path in figures)


@pytest.mark.slow  # one kill is tested by default, in running/test_runner.py
def test_two_runs_and_the_command_line_give_the_same_bytes(unbroken: Unbroken, tiny_family: Path, tmp_path: Path) -> None:
    """Killed with SIGKILL in two places and started again, of one process and of two: the same table, and no finished record made again."""
    study, out = write_study(tmp_path), place_world(tiny_family, tmp_path / "out")
    finished: dict[Path, int] = {}
    for needed, jobs in ((1, 1), (6, 2)):
        process = subprocess.Popen(command("compare", study, "--out", out, "--jobs", jobs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list((out / "records").glob("*.parquet"))) < needed and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
        finished |= {record: record.stat().st_mtime_ns for record in (out / "records").glob("*.parquet") if record not in finished}
    done = subprocess.run(command("compare", study, "--out", out, "--jobs", 2, "--format", "json"), capture_output=True, text=True, check=True)
    assert done.stdout.rstrip("\n") == unbroken.results.json()
    assert (out / "results.json").read_text() == done.stdout
    assert len(finished) >= 6
    assert {record: record.stat().st_mtime_ns for record in finished} == finished
    assert "from its record" in done.stderr


def test_a_damaged_record_is_made_again(unbroken: Unbroken, tmp_path: Path) -> None:
    out = Path(shutil.copytree(unbroken.out, tmp_path / "out"))
    victims = sorted((out / "records").glob("*.parquet"))[:3]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(victims[1].read_bytes()[:-9])
    victims[2].unlink()
    study = Study.model_validate(STUDY)
    again = run_in_process(study, out)
    assert summarize(study, again.records, again.costs, prompts=again.prompts).json() == unbroken.results.json()


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


def test_other_weights_and_other_items_are_other_records(unbroken: Unbroken, tmp_path: Path) -> None:
    """The key is of the weights themselves: the same path with changed weights must not find the old record."""
    out = Path(shutil.copytree(unbroken.out, tmp_path / "out"))
    study = Study.model_validate(STUDY | {"measures": ["task"], "arms": {"base": {"kind": "base"}}})
    count = len(list((out / "records").glob("*")))
    before = run_in_process(study, out).records
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
    other = run_in_process(study.model_copy(update={"measures": ("knowledge",)}), out).records
    assert before[0].protocol != other[0].protocol


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
    study = {key: value for key, value in STUDY.items() if key != "worlds"} | {
        "models": {"base": "base", "small": "small"},
        "data": {"train": "train.jsonl", "test": "test.jsonl", "knowledge": "knowledge.jsonl", "prompt": "{question}", "answer": "choose"},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return path


def test_real_checkpoints_in_folders(tmp_path: Path) -> None:
    study, folder = load_study(write_real_study(tmp_path / "study"))
    finished = run_in_process(study, tmp_path / "out", folder)
    results = summarize(study, finished.records, finished.costs)
    assert {row["measure"] for row in results.rows} >= {"task", "knowledge", "forgetting/popularity=low"}
    assert {row.arm for row in results.measures["density"].changes} == {"full", "lora"}


def test_a_given_expert_is_used(tmp_path: Path) -> None:
    arms = {"base": {"kind": "base"}, "expert": {"kind": "expert", "path": "small"}, "proxy": {"kind": "proxy", "alpha": [1.0]}}
    study, folder = load_study(write_real_study(tmp_path / "study", arms=arms, measures=["task"]))
    records = {record.arm: record.items["text"].tolist() for record in run_in_process(study, tmp_path / "out", folder).records}
    assert records["proxy@1"] == records["base"]
    assert records["expert"] != records["base"]


def test_changed_items_are_asked_in_the_same_process_too(tmp_path: Path) -> None:
    """A file that changed between two runs of one study. Twin: a file that did not."""
    study, folder = load_study(write_real_study(tmp_path / "study", arms={"base": {"kind": "base"}}, measures=["task"]))
    (first,), (again,) = (run_in_process(study, tmp_path / "out", folder).records for _ in range(2))
    assert again.protocol == first.protocol
    lines = (folder / "test.jsonl").read_text().splitlines()
    (folder / "test.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    (fewer,) = run_in_process(study, tmp_path / "out", folder).records
    assert (len(first.items), len(fewer.items)) == (20, 19)
    assert fewer.protocol != first.protocol


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
        run_in_process(study, tmp_path / "out", folder)
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


def test_fewer_seeds_have_a_folder_of_their_own_and_the_studys_records(unbroken: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, out = tmp_path / "study.yaml", tmp_path / "out"
    study.write_text(yaml.safe_dump(STUDY | {"seeds": [0, 5]}, sort_keys=False))
    shutil.copytree(unbroken.out, out)
    monkeypatch.setattr("evals.arms.tune", lambda *_, **__: pytest.fail("tuned again"))
    done = run_command("compare", study, "--seeds", 1, "--out", out, "--jobs", 1, "--format", "json")
    assert done.returncode == 0, done.stderr
    assert not (out / "results.json").exists(), "the whole study's results would be these"
    quick = read_results(out / "small-1-seeds" / "results.json")
    assert (quick.header.study, list(quick.header.seeds)) == ("small-1-seeds", [0])
    assert quick.rows == json.loads(unbroken.results.json())["rows"]
    assert not (out / "small-1-seeds" / "records").exists()
    assert run_command("compare", study, "--seeds", 0, "--out", out).returncode == 2
