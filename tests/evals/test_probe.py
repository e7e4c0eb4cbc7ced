"""The probe command and a study of everything inside, on tiny random models: all of it runs, resumes, and answers for itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from scipy.stats import entropy
from typer.testing import CliRunner

from evals.cli import app
from evals.compare import run_study
from evals.findings import Found, change, intervals, restoration_seeds
from evals.material import material_for
from evals.probe import INSIDE, Probe, probe_study
from evals.progress import Display
from evals.records import Record
from evals.results import summarize
from evals.study import Study, load_study
from evals.verdicts import verdict_rows
from proxytune import UserError
from proxytune.member import load_member

TUNING: dict[str, Any] = {"method": "full", "learning_rate": 1e-2, "epochs": 4, "batch_size": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a full copy of it that is tuned far, a LoRA adapter on it, and items."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 1), ("tuned", 2)):
        make_model(seed=seed, layers=3).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    shutil.copytree(folder / "base", folder / "copy")
    get_peft_model(make_model(seed=1, layers=3), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).save_pretrained(
        folder / "lora"
    )
    items = [
        {"question": f"w{4 + number % 9} w{20 + number}", "statement": f"w3 w{4 + number} w9", "subject": f"w{4 + number}"}
        | {
            "answer": f"w{30 + number % 4}",
            "choices": [f"w{30 + other}" for other in range(4)],
            "popularity": 10 * (number % 3),
            "unit": f"u{number}",
        }
        for number in range(40)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "train.jsonl").write_text("".join(json.dumps({**item, "question": f"w48 {item['question']}"}) + "\n" for item in items[:24]))
    return folder


def study_of(place: Path, **changes: Any) -> tuple[Study, Path]:
    content: dict[str, Any] = {
        "study": "inside",
        "models": {"base": "base"},
        "data": {"train": "train.jsonl", "test": "items.jsonl", "knowledge": "items.jsonl", "prompt": "{question}", "answer": "choose"},
        "measures": ["task", "knowledge", *INSIDE],
        "relearning": {"steps": 4},
        "arms": {
            "base": {"kind": "base"},
            "full": {"kind": "direct", "tuning": TUNING},
            "full-shuffled": {"kind": "direct", "tuning": TUNING | {"shuffled": True}},
            "full-frozen": {"kind": "direct", "tuning": TUNING | {"frozen": "lower"}, "dial": {"epochs": [1, 2]}, "choose": "full"},
            "copy": {"kind": "direct", "path": "copy"},
            "lora": {"kind": "direct", "path": "lora"},
        },
    }
    path = place / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return load_study(path)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path, list[Record], dict[str, Any]]:
    study, folder = study_of(place)
    out = tmp_path_factory.mktemp("out")
    with Display() as display:
        records = run_study(study, folder, out, display)
    return study, out, records, summarize(study, records)


def test_everything_inside_is_found_of_every_tuned_base(whole: tuple[Study, Path, list[Record], dict[str, Any]]) -> None:
    _, _, _, results = whole
    tuned = {"full", "full-shuffled", "full-frozen", "copy", "lora"}
    assert {row["arm"] for row in results["law"]} == tuned | {"base"}
    for section in ("erosion", "drift", "restoration", "patching", "recoverability"):
        assert {row["arm"] for row in results[section]} == tuned, section
    assert {row["arm"] for row in results["verdicts"]} == {"full", "copy", "lora"}  # controls are not judged
    json.dumps(results, allow_nan=False)


def test_a_copy_of_the_base_differs_in_nothing(whole: tuple[Study, Path, list[Record], dict[str, Any]]) -> None:
    _, _, _, results = whole
    for section in ("erosion", "law", "restoration", "patching"):
        rows = [row for row in results[section] if row["arm"] == "copy"]
        assert rows, section
        assert all((row["value"], row["low"], row["high"]) == (0, 0, 0) for row in rows), section
        assert any(row["value"] != 0 for row in results[section] if row["arm"] == "full"), section  # the twin
    drift = {(row["block"], row["what"]): row["value"] for row in results["drift"] if row["arm"] == "copy"}
    assert {value for (_, what), value in drift.items() if what.startswith(("cka", "cosine"))} - {None} == {1.0}
    assert {value for (_, what), value in drift.items() if what == "relative_change"} == {0.0}
    lens = {row["arm"]: row["value"] for row in results["lens"] if (row["lens"], row["what"], row["state"]) == ("plain", "share", 2)}
    assert lens["copy"] == lens["base"] != lens["full"]
    verdict = next(row for row in results["verdicts"] if row["arm"] == "copy")
    assert verdict["verdict"] == "cannot tell: one seed"


def test_divergence_is_that_of_the_two_models_laws(whole: tuple[Study, Path, list[Record], dict[str, Any]], place: Path) -> None:
    _, _, records, _ = whole
    found = next(record.items for record in records if (record.arm, record.measurement) == ("lora", "law"))
    base, tuned = (load_member(place / "base", adapter).model for adapter in (None, place / "lora"))
    for index in (0, 7, 23):
        ids = make_tokenizer()(f"w3 w{4 + index} w9", return_tensors="pt").input_ids
        laws = [model(ids).logits[0, -1].double().softmax(-1).detach().numpy() for model in (base, tuned)]
        assert found["divergence"][index] == pytest.approx(entropy(*laws), rel=1e-4)
        assert found["divergence"][index] != pytest.approx(entropy(*reversed(laws)), rel=1e-4)


def test_restored_blocks_add_up_to_the_loss(whole: tuple[Study, Path, list[Record], dict[str, Any]]) -> None:
    study, _, records, _ = whole
    names, (seed,) = restoration_seeds(Found(study, records), "full")
    blocks = [position for position, (what, _) in enumerate(names) if what == "shapley"]
    np.testing.assert_allclose(seed[:, blocks].sum(axis=1), seed[:, names.index(("loss", "all"))], atol=1e-9)
    assert np.abs(seed[:, 0]).max() > 0.01


def test_each_clause_finds_its_control(whole: tuple[Study, Path, list[Record], dict[str, Any]]) -> None:
    study, _, records, _ = whole
    rows = {row["arm"]: {clause["clause"]: clause for clause in row["clauses"]} for row in verdict_rows(Found(study, records), [])}
    assert rows["full"]["density/shuffled"]["note"] == "less full-shuffled; one seed"
    assert rows["full"]["freezing"]["note"] == "full-frozen less full; one seed"
    assert rows["full"]["freezing"]["value"] is not None
    assert rows["lora"]["freezing"]["value"] is None
    assert "no arm is the same" in rows["lora"]["density/shuffled"]["note"]
    assert all((clause["state"], clause["needs"]) == ("cannot tell", None) for row in rows.values() for clause in row.values())


def test_seeds_judge_what_was_tuned_again_and_one_checkpoint_asked_three_times_is_one_seed(
    whole: tuple[Study, Path, list[Record], dict[str, Any]],
) -> None:
    """The same items in every seed. Twins: seeds that are alike to the bit; a checkpoint given by its path, whatever its seeds say."""
    study, _, records, _ = whole
    alike = [replace(record, seed=seed) for seed in range(3) for record in records]
    noisy = [_jittered(record) for record in alike]
    for found, judged in ((alike, set()), (noisy, {"full"})):
        rows = verdict_rows(Found(study, found), [])
        assert {row["arm"] for row in rows if row["verdict"] != "cannot tell: one seed"} == judged
        told = {row["arm"] for row in rows for clause in row["clauses"] if clause["state"] != "cannot tell"}
        assert told <= judged
    once, thrice = (
        np.array(intervals(of.estimate(change(of, "lora", "residual", "last", [1])))) for of in (Found(study, records), Found(study, alike))
    )
    np.testing.assert_allclose(thrice, once, rtol=1e-9)
    assert (once[:, 1] < once[:, 2]).all()


def _jittered(record: Record) -> Record:
    if record.measurement != "states" or record.arm == "base":
        return record
    columns = [str(name) for name in record.items if str(name).startswith("effective_rank")]
    return replace(record, items=record.items.assign(**{name: record.items[name] + 1e-6 * record.seed for name in columns}))


def test_records_are_used_again_and_belong_to_their_weights(
    whole: tuple[Study, Path, list[Record], dict[str, Any]], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _, results = whole
    study, folder = study_of(place)
    monkeypatch.setattr("evals.inside.restore", lambda *_, **__: pytest.fail("measured twice"))
    with Display() as display:
        assert summarize(study, run_study(study, folder, out, display)) == results
        shutil.copytree(place / "tuned", place / "other")
        arms = {"base": {"kind": "base"}, "copy": {"kind": "direct", "path": "other"}}
        other, folder = study_of(place, arms=arms, measures=["restoration"])
        with pytest.raises(pytest.fail.Exception, match="measured twice"):
            run_study(other, folder, out, display)


def test_a_merged_adapter_is_the_model_with_the_adapter(place: Path) -> None:
    adapted, merged = (load_member(place / "base", place / "lora", merged=merged).model for merged in (False, True))
    assert not any(".lora_" in name for name, _ in merged.named_parameters())
    ids = make_tokenizer()("w3 w4 w5", return_tensors="pt").input_ids
    np.testing.assert_allclose(adapted(ids).logits.detach(), merged(ids).logits.detach(), atol=1e-4)
    assert not np.allclose(merged(ids).logits.detach(), load_member(place / "base").model(ids).logits.detach(), atol=1e-2)


def test_a_corpus_gives_the_popularity(place: Path, tmp_path: Path) -> None:
    """Subject and answer of the item stand together in so many lines; the file's own popularity no longer counts."""
    (tmp_path / "text.txt").write_text("w4 likes w30\n" * 3 + "w5 likes w31\nw5 likes w32\nw6 is alone\n")
    data = {"knowledge": "items.jsonl", "corpus": str(tmp_path / "text.txt"), "prompt": "{question}"}
    study, folder = study_of(place, data=data, measures=["density"], arms={"base": {"kind": "base"}, "copy": {"kind": "direct", "path": "copy"}})
    said: list[str] = []
    material = material_for(study, folder, 0, tmp_path, say=said.append)
    assert [item.popularity for item in material.knowledge[:4]] == [3, 1, 0, 0]
    assert material.frequency is not None
    assert list(material.frequency[:4]) == [3, 2, 1, 0]
    assert any("2 of 40 statements stand in it" in line for line in said)


def test_items_without_choices_are_refused_before_anything_is_read(place: Path, tmp_path: Path) -> None:
    items = [json.loads(line) for line in (place / "items.jsonl").read_text().splitlines()]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({**item, "choices": []}) + "\n" for item in items))
    for measure, refused in (("density", False), ("restoration", True)):
        study, folder = study_of(place, data={"knowledge": str(tmp_path / "bare.jsonl")}, measures=[measure], arms={"base": {"kind": "base"}})
        if refused:
            with pytest.raises(UserError, match=r"data\.knowledge: the item 'w4 w20' has no choices"):
                material_for(study, folder, 0, tmp_path)
        else:
            assert len(material_for(study, folder, 0, tmp_path).knowledge) == 40


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["probe", *map(str, arguments)])


def test_models_are_probed_by_name(place: Path, tmp_path: Path) -> None:
    given = ("--knowledge", place / "items.jsonl", "--out", tmp_path, "--threads", 1, "--format", "json")
    result = run("drift", place / "base", place / "tuned", place / "lora", *given)
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert {row["arm"] for row in found["drift"]} == {"tuned", "lora"}
    assert found["restoration"] == [] == found["verdicts"]
    assert json.loads((tmp_path / "drift" / "results.json").read_text()) == found


def probe_of(name: str, target: str | None, *tuned: str, knowledge: str | None = None) -> Probe:
    return Probe(name, target, tuned, knowledge, None, None, "{question}", 1)


def test_which_study_a_probe_is(place: Path) -> None:
    study, _ = probe_study(probe_of("erosion", None))
    assert (study.study, study.measures[-5:]) == ("erosion", INSIDE)
    assert "knowledge" in study.measures
    assert probe_study(probe_of("lens", None))[0].measures == ("lens",)
    study_of(place)
    assert probe_study(probe_of("drift", str(place / "study.yaml")))[0].measures == ("drift",)


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (probe_of("drift", "base", "tuned"), "--knowledge: models are read by items"),
        (probe_of("drift", "some.yaml", "tuned"), "names its own models and data"),
        (probe_of("drift", "base", "a/base", "b/base", "b/base", knowledge="k.jsonl"), "twice"),
    ],
)
def test_a_probe_that_cannot_be_is_one_line(probe: Probe, message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe_study(probe)


def test_a_tuned_model_of_another_shape_is_refused(place: Path, tmp_path: Path) -> None:
    make_model(layers=2).save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    result = run("drift", place / "base", tmp_path / "small", "--knowledge", place / "items.jsonl", "--out", tmp_path / "out")
    assert isinstance(result.exception, UserError)
    assert "give two models of the same shape" in str(result.exception)
