"""`proxytune probe density --checkpoints`: a run's checkpoints in the order of their steps, the last one as the base."""

from pathlib import Path

import pytest

from evals.commands.probe import Probe, probe_study
from evals.measures.separation import step_of
from evals.study import Study
from proxytune.errors import UserError


def study_of(*checkpoints: Path | str, target: str | None = None) -> Study:
    return probe_study(Probe("density", target, [], None, None, None, "{question}", 1, checkpoints=list(map(str, checkpoints))))[0]


def make(place: Path, *names: str) -> list[Path]:
    for name in names:
        (place / name).mkdir()
        (place / name / "config.json").write_text("{}")
    return [place / name for name in names]


@pytest.mark.parametrize(
    ("name", "step"), [("step-100", 100), ("step1000-tokens4B", 1000), ("checkpoint-500", 500), ("run_step_7", 7), ("final", None), ("base-2", None)]
)
def test_the_step_is_in_the_name(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_a_folder_of_checkpoints_is_read_in_the_order_of_steps(tmp_path: Path) -> None:
    make(tmp_path, "step-100", "step-20", "step-3000")
    (tmp_path / "logs").mkdir()
    study = study_of(tmp_path)
    assert Path(study.models.base).name == "step-3000"
    assert list(study.arms) == ["base", "step-20", "step-100"]
    one_by_one = study_of(*make(tmp_path / "logs", "step-9", "step-1"), tmp_path / "step-20")
    assert [Path(str(study.arms[name].path)).name for name in study.arms if name != "base"] == ["step-20", "step-100"]
    assert (Path(one_by_one.models.base).name, list(one_by_one.arms)) == ("step-20", ["base", "step-1", "step-9"])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (only,) = make(tmp_path, "step-1")
    with pytest.raises(UserError, match=r"give two models or more whose names have a step, .* not 1 of them"):
        study_of(tmp_path)
    with pytest.raises(UserError, match=r"not '.*final'"):
        study_of(only, *make(tmp_path, "final"))
    with pytest.raises(UserError, match="the last checkpoint is the base; give no other model"):
        study_of(only, target="base")
