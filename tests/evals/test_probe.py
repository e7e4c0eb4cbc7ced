"""The probe command and a study of everything inside, on tiny random models: all of it runs, resumes, and answers for itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import Unbroken, make_model, make_tokenizer, run_in_process
from peft import LoraConfig, get_peft_model
from scipy.stats import entropy
from typer.testing import CliRunner

from evals.cli import app
from evals.commands.probe import Probe, probe_study
from evals.data import data_for
from evals.measures.density import density_change
from evals.measures.registry import measures
from evals.measures.restoration import restored_by_seed
from evals.records import Record
from evals.results.recorded import Recorded
from evals.results.summary import Results, summarize
from evals.statistics.estimates import intervals
from evals.statistics.judged import Verdict
from evals.study import Study, load_study
from proxytune.errors import UserError
from proxytune.member import load_member

INSIDE = measures()["erosion"].built_on
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
        "measures": ["task", "knowledge", *INSIDE, "erosion"],
        "settings": {"recoverability": {"steps": 4}},
        "arms": {
            "base": {"kind": "base"},
            "full": {"kind": "direct", "tuning": TUNING},
            "full-shuffled": {"kind": "direct", "tuning": TUNING | {"shuffled": True}},
            "full-frozen": {"kind": "direct", "tuning": TUNING | {"frozen": "lower"}, "sweep": {"epochs": [1, 2]}, "select": {"match": "full"}},
            "copy": {"kind": "direct", "path": "copy"},
            "lora": {"kind": "direct", "path": "lora"},
        },
    }
    path = place / "study.yaml"
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return load_study(path)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    study, folder = study_of(place)
    out = tmp_path_factory.mktemp("out")
    finished = run_in_process(study, out, folder)
    return Unbroken(out, finished, summarize(study, finished.records, finished.costs))


@pytest.fixture
def study(place: Path) -> Study:
    return study_of(place)[0]


def sections(results: Results) -> dict[str, list[Any]]:
    """The rows of what is concluded of every tuned model."""
    of = results.measures
    return {
        "changes": list(of["density"].changes),
        "blocks": list(of["drift"].blocks),
        "parts": list(of["restoration"].parts),
        "patched": list(of["restoration"].patched),
        "recovered": list(of["recoverability"].arms),
    }


def test_everything_inside_is_found_of_every_tuned_base(whole: Unbroken) -> None:
    results = whole.results
    tuned = {"full", "full-shuffled", "full-frozen", "copy", "lora"}
    assert {row.arm for row in results.measures["drift"].distances} == tuned | {"base"}
    for section, found in sections(results).items():
        assert {row.arm for row in found} == tuned, section
    assert {row.arm for row in results.measures["erosion"].verdicts} == {"full", "copy", "lora"}  # controls are not judged
    json.dumps(json.loads(results.json()), allow_nan=False)


def test_a_copy_of_the_base_differs_in_nothing(whole: Unbroken) -> None:
    of, found = whole.results.measures, sections(whole.results)
    for section, rows, name in (
        ("changes", found["changes"], "change"),
        ("distances", of["drift"].distances, "kl"),
        ("parts", found["parts"], "value"),
        ("patched", found["patched"], "value"),
    ):
        values = [getattr(row, name) for row in rows if row.arm == "copy"]
        assert values, section
        assert all((value.value, value.low, value.high) == (0, 0, 0) for value in values), section
        assert any(getattr(row, name).value != 0 for row in rows if row.arm == "full"), section  # the twin
    drift = [row for row in found["blocks"] if row.arm == "copy"]
    assert {row.value.value for row in drift if row.what == "cka"} - {None} == {1.0}
    assert [row.value.value for row in drift if row.what == "cosine"] == pytest.approx([1.0] * 8, abs=1e-12)
    assert {row.value.value for row in drift if row.what == "relative_change"} == {0.0}
    lens = {row.arm: row.value.value for row in of["lens"].rows if (row.lens, row.what, row.state) == ("plain", "share", 2)}
    assert lens["copy"] == lens["base"] != lens["full"]
    (verdict,) = [row for row in of["erosion"].verdicts if row.arm == "copy"]
    assert verdict.verdict == "cannot tell: one seed"


def test_divergence_is_that_of_the_two_models_distributions(whole: Unbroken, place: Path) -> None:
    found = next(record.items for record in whole.finished.records if (record.arm, record.frame) == ("lora", "distribution"))
    base, tuned = (load_member(place / "base", adapter).model for adapter in (None, place / "lora"))
    for index in (0, 7, 23):
        ids = make_tokenizer()(f"w3 w{4 + index} w9", return_tensors="pt").input_ids
        distributions = [model(ids).logits[0, -1].double().softmax(-1).detach().numpy() for model in (base, tuned)]
        assert found["divergence"][index] == pytest.approx(entropy(*distributions), rel=1e-4)
        assert found["divergence"][index] != pytest.approx(entropy(*reversed(distributions)), rel=1e-4)


def test_restored_blocks_add_up_to_the_loss(whole: Unbroken, study: Study) -> None:
    names, (seed,) = restored_by_seed(Recorded(study, whole.finished.records), "full")
    blocks = [position for position, (what, _) in enumerate(names) if what == "shapley"]
    np.testing.assert_allclose(seed[:, blocks].sum(axis=1), seed[:, names.index(("loss", "all"))], atol=1e-9)
    assert np.abs(seed[:, 0]).max() > 0.01


def judged(study: Study, records: list[Record]) -> tuple[Verdict, ...]:
    """The verdicts without relearning, whose intervals take long."""
    return Recorded(study, [record for record in records if record.frame != "recoverability"]).summary("erosion").verdicts


def test_each_clause_finds_its_control(whole: Unbroken, study: Study) -> None:
    rows = {row.arm: {clause.clause: clause for clause in row.clauses} for row in judged(study, whole.finished.records)}
    assert rows["full"]["density/shuffled"].note == "minus full-shuffled; one seed"
    assert rows["full"]["freezing"].note == "full-frozen minus full; one seed"
    assert rows["full"]["freezing"].value.value is not None
    assert rows["lora"]["freezing"].value.value is None
    assert "no arm is the same" in rows["lora"]["density/shuffled"].note
    assert "was not measured" in rows["full"]["savings"].note
    assert all((clause.state, clause.needs) == ("cannot tell", None) for row in rows.values() for clause in row.values())
    with_relearning = {row.arm: {clause.clause: clause for clause in row.clauses} for row in whole.results.measures["erosion"].verdicts}
    for arm, row in rows.items():
        assert {name: clause for name, clause in row.items() if name != "savings"} == {
            name: clause for name, clause in with_relearning[arm].items() if name != "savings"
        }
        assert "was not measured" not in with_relearning[arm]["savings"].note


def test_seeds_judge_what_was_tuned_again_and_one_checkpoint_asked_three_times_is_one_seed(whole: Unbroken, study: Study) -> None:
    """The same items in every seed. Twins: seeds that are alike to the bit; a checkpoint given by its path, whatever its seeds say."""
    records = whole.finished.records
    alike = [replace(record, seed=seed) for seed in range(3) for record in records]
    noisy = [_jittered(record) for record in alike]
    for told_of, expected in ((alike, set()), (noisy, {"full"})):
        rows = judged(study, told_of)
        assert {row.arm for row in rows} == {"full", "copy", "lora"}
        assert {row.arm for row in rows if row.verdict != "cannot tell: one seed"} == expected
        told = {row.arm for row in rows for clause in row.clauses if clause.state != "cannot tell"}
        assert told <= expected
    found = (Recorded(study, of) for of in (records, alike))
    once, thrice = (np.array(intervals(of.estimate(density_change(of, "lora", [("residual", "last", [1])])))) for of in found)
    np.testing.assert_allclose(thrice, once, rtol=1e-9)
    assert (once[:, 1] < once[:, 2]).all()


def _jittered(record: Record) -> Record:
    if record.frame != "states" or record.arm == "base":
        return record
    moved = 1e-6 * record.seed * (record.items["metric"] == "effective_rank")
    return replace(record, items=record.items.assign(value=record.items["value"] + moved))


def test_records_are_used_again_and_belong_to_their_weights(whole: Unbroken, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, folder = study_of(place)
    monkeypatch.setattr("evals.measures.restoration.restore", lambda *_, **__: pytest.fail("measured twice"))
    again = run_in_process(study, whole.out, folder)
    assert summarize(study, again.records, again.costs) == whole.results
    shutil.copytree(place / "tuned", place / "other")
    arms = {"base": {"kind": "base"}, "copy": {"kind": "direct", "path": "other"}}
    other, folder = study_of(place, arms=arms, measures=["restoration"])
    with pytest.raises(pytest.fail.Exception, match="measured twice"):
        run_in_process(other, whole.out, folder)


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
    found = data_for(study, folder, study.runs[0], tmp_path, said.append)
    assert [item.popularity for item in found.knowledge[:4]] == [3, 1, 0, 0]
    assert found.frequency is not None
    assert list(found.frequency[:4]) == [3, 2, 1, 0]
    assert any("2 of 40 statements stand in it" in line for line in said)


def test_items_without_choices_are_refused_before_anything_is_read(place: Path, tmp_path: Path) -> None:
    items = [json.loads(line) for line in (place / "items.jsonl").read_text().splitlines()]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({**item, "choices": []}) + "\n" for item in items))
    for measure, refused in (("density", False), ("restoration", True)):
        study, folder = study_of(place, data={"knowledge": str(tmp_path / "bare.jsonl")}, measures=[measure], arms={"base": {"kind": "base"}})
        if refused:
            with pytest.raises(UserError, match=r"data\.knowledge: the item 'w4 w20' has no choices"):
                data_for(study, folder, study.runs[0], tmp_path)
        else:
            assert len(data_for(study, folder, study.runs[0], tmp_path).knowledge) == 40


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["probe", *map(str, arguments)])


def test_models_are_probed_by_name(place: Path, tmp_path: Path) -> None:
    given = ("--knowledge", place / "items.jsonl", "--out", tmp_path, "--threads", 1, "--jobs", 1, "--format", "json")
    result = run("drift", place / "base", place / "tuned", place / "lora", *given)
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert set(found["measures"]) == {"drift"}
    assert {row["arm"] for row in found["measures"]["drift"]["blocks"]} == {"tuned", "lora"}
    assert json.loads((tmp_path / "drift" / "results.json").read_text()) == found


def probe_of(name: str, target: str | None, *tuned: str, knowledge: str | None = None) -> Probe:
    return Probe(name, target, tuned, knowledge, None, None, "{question}", 1)


def test_which_study_a_probe_is(place: Path) -> None:
    study, _ = probe_study(probe_of("erosion", None))
    assert (study.study, study.measures[-6:]) == ("erosion", (*INSIDE, "erosion"))
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
    result = run("drift", place / "base", tmp_path / "small", "--knowledge", place / "items.jsonl", "--out", tmp_path / "out", "--jobs", 1)
    assert isinstance(result.exception, UserError)
    assert "give two models of the same shape" in str(result.exception)
