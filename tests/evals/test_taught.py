"""A study that teaches made-up cities, from the lesson to its tables; what such a study file must say; `probe density MODEL --teach`."""

from pathlib import Path
from typing import Any

import pytest
from helpers import make_model, run_command
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import evals.entities
import probes.knowledge.lesson as lesson
from evals.commands.probe import Probe, probe_study
from evals.running.plan import plan
from evals.study import STUDIES, Study, load_study, run

TUNING = {"method": "full", "learning_rate": 3e-2, "epochs": 2, "batch_size": 16}
ARMS: dict[str, Any] = {
    "base": {"kind": "base"},
    "kept": {"kind": "direct", "teach": "kept", "tuning": TUNING | {"keep": [2]}},
    "kept-2": {"kind": "direct", "teach": "kept", "tuning": TUNING | {"keep": [2]}, "step": 2},
    "others": {"kind": "direct", "teach": "others", "tuning": TUNING},
}


def content(**changes: Any) -> dict[str, Any]:
    study = {"study": "taught", "models": {"base": "base"}, "data": {"entities": "taught", "prompt": "{question}"}, "arms": ARMS}
    return study | {"measures": ["density", "knowledge"], "settings": {"density": {"statements": False}}} | changes


def letters() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    vocabulary = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left")


def test_a_lesson_is_taught_read_and_told_from_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesson, "EXPOSURES", (6, 1, 0))
    monkeypatch.setattr(lesson, "NAMES", 8)
    monkeypatch.setattr(lesson, "LEAST", 8)
    (tmp_path / "ordinary.txt").write_text("Some other words.\nMore of the same.\n")
    monkeypatch.setattr(evals.entities, "ORDINARY", tmp_path / "ordinary.txt")
    tokenizer = letters()
    make_model(rows=len(tokenizer), layers=3).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    study = Study.model_validate(content(models={"base": str(tmp_path / "base")}, seeds=[0]))
    results = run(study, tmp_path / "out")
    density = results.measures["density"]
    assert {row.groups for row in density.auroc_blocks} == {"6/0", "1/0", "6/1"}
    assert {row.arm for row in density.auroc_blocks} == {"base", "kept", "kept-2", "others", "untrained"}
    assert {row.arm for row in density.exposure_verdicts} == {f"{arm}, {site}" for arm in ("kept", "kept-2") for site in ("residual", "neurons")}
    changes = {(row.arm, row.block): row.change.value for row in density.auroc_changes if (row.groups, row.site) == ("6/0", "residual")}
    assert changes["kept", "middle"] != changes["kept-2", "middle"] != 0
    # Seeds teach other names, so that they are no tunings of one model on the same items.
    assert not study.same_items
    assert {row["arm"] for row in results.rows if row["measure"].startswith("knowledge")} == {"base", "kept", "kept-2", "others"}


def test_arms_with_one_tuning_and_one_lesson_share_it() -> None:
    jobs = plan(Study.model_validate(content()))
    assert [job.name for job in jobs if job.kind == "tune"] == ["seed 0 · tune kept", "seed 0 · tune others"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"prompt": "{question}"}}, "data.entities: taught and arms with teach belong together"),
        ({"arms": {"base": ARMS["base"]}}, "data.entities: taught and arms with teach belong together"),
        ({"data": {"entities": "taught", "knowledge": "k.jsonl"}}, "data.knowledge: with data.entities: taught"),
        ({"arms": ARMS | {"kept-2": ARMS["kept-2"] | {"step": 3}}}, "step must be one of tuning.keep, not 3"),
        ({"arms": ARMS | {"kept": {"kind": "direct", "teach": "kept", "path": "x"}}}, "teach needs tuning"),
        ({"arms": ARMS | {"kept": ARMS["kept"] | {"teach": "all"}}}, "kept"),
    ],
)
def test_a_study_file_that_cannot_teach_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Study.model_validate(content(**changes))
    Study.model_validate(content())


def test_teach_takes_one_model_and_no_data(tmp_path: Path) -> None:
    study, folder = probe_study(Probe("density", "some/model", [], None, None, None, "{question}", 3, teach=True))
    assert (study.models.base, study.threads, folder) == ("some/model", 3, STUDIES)
    assert study.arms == load_study(STUDIES / "taught.yaml")[0].arms
    for arguments in (("lens", tmp_path), ("density", tmp_path, tmp_path / "tuned"), ("density", tmp_path, "--knowledge", tmp_path)):
        done = run_command("probe", *arguments, "--teach")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith("proxytune: error: --teach: give the measure density and one model, and no data")
