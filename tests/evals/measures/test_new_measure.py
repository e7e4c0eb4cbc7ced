"""A measure that is one module, and no other change: the study file, the command line, records, tables, figures and results know it."""

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import STUDY, place_world
from typer.testing import CliRunner

from evals.cli import app
from evals.measures import registry
from evals.results.summary import read_results
from evals.study import load_study
from proxytune.errors import UserError

MODULE = Path(__file__).parent / "answer_length.py"


@pytest.fixture
def answer_length(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry.measures()
    monkeypatch.setattr(registry, "_measures", dict(registry._measures))
    monkeypatch.syspath_prepend(MODULE.parent)
    importlib.import_module("answer_length")
    yield
    del sys.modules["answer_length"]


def write(folder: Path, **changes: object) -> Path:
    study = copy.deepcopy(STUDY) | {"measures": ["answer_length"], "settings": {"answer_length": {"unit": 2}}} | changes
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder / "study.yaml"


def test_the_module_is_short() -> None:
    assert len(MODULE.read_text().splitlines()) < 60


@pytest.mark.usefixtures("answer_length")
def test_a_study_measures_it(tiny_family: Path, tmp_path: Path) -> None:
    out, path = place_world(tiny_family, tmp_path / "out"), write(tmp_path)
    run = ["compare", str(path), "--out", str(out), "--jobs", "1", "--full"]
    first = CliRunner().invoke(app, run)
    assert first.exit_code == 0, first.output
    assert "Answer length" in first.stdout
    assert (out / "answer-length.png").stat().st_size > 5000
    lengths = dict(json.loads((out / "results.json").read_text())["measures"]["answer_length"]["arms"])
    assert set(lengths) == {"base", "expert", "proxy@0", "proxy@1", "full", "lora"}
    assert lengths["base"]["value"] == lengths["proxy@0"]["value"] > 0
    assert lengths["base"]["value"] != lengths["full"]["value"]
    assert dict(read_results(out / "results.json").measures["answer_length"].arms)["base"].value == lengths["base"]["value"]
    before = {file.name: file.stat().st_mtime_ns for file in (out / "records").iterdir()}
    again = CliRunner().invoke(app, run)  # from its records
    assert again.stdout == first.stdout
    assert {file.name: file.stat().st_mtime_ns for file in (out / "records").iterdir()} == before


@pytest.mark.usefixtures("answer_length")
def test_help_lists_it_and_study_files_are_checked(tmp_path: Path) -> None:
    for command in ("compare", "probe"):
        assert "How long are an arm's answers?" in CliRunner().invoke(app, [command, "--help"]).stdout
    assert load_study(write(tmp_path))[0].settings_of("answer_length").unit == 2
    for changes, words in (
        ({"settings": {"answer_length": {"unit": 0}}}, "settings: answer_length.unit: .*greater than or equal to 1, not 0"),
        ({"settings": {"answer_length": {"units": 2}}}, "answer_length.units: there is no such key; did you mean 'unit'?"),
        ({"measures": ["answer_lenght"]}, "there is no measure 'answer_lenght'; did you mean 'answer_length'?"),
    ):
        with pytest.raises(UserError, match=words):
            load_study(write(tmp_path, **changes))


def test_without_the_module_nobody_knows_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no measure 'answer_length'"):
        load_study(write(tmp_path, settings={}))


@pytest.mark.usefixtures("answer_length")
def test_two_measures_of_one_name_are_refused() -> None:
    other = type("Other", (), {"name": "task"})()
    with pytest.raises(UserError, match="two are called 'task'"):
        registry.register(other)
