"""Released training dynamics: read, averaged, compared with the published means, and refused where they are something else."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import run_command

from evals.released.dynamics import read_dynamics, settle
from proxytune.errors import UserError

ROWS = [
    {"step": step, "id_top5pct_energy": 0.25 + step / 1000, "hard_top5pct_energy": 0.26 + step / 500, "id_acc": 0.5, "mine": 1} for step in (1, 2, 3)
]


def write(place: Path, content: Any) -> Path:
    file = place / "dynamics.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_means_and_differences_are_over_the_last_evaluations(tmp_path: Path) -> None:
    found = settle(read_dynamics(write(tmp_path, ROWS)), "run", 2)
    rows = {(row.group, row.metric): row for row in found.settled}
    assert found.evaluations == 2
    assert set(rows) == {("id", "top5pct_energy"), ("hard", "top5pct_energy"), ("id", "acc")}
    hard = rows["hard", "top5pct_energy"]
    assert (hard.mean, hard.difference) == pytest.approx((0.265, 0.0125))
    assert hard.sd == pytest.approx(0.001 / 2**0.5)
    assert settle(read_dynamics(write(tmp_path, ROWS)), "run", 0).settled[0].mean != found.settled[0].mean


def test_the_published_means_come_out() -> None:
    place = os.environ.get("PROXYTUNE_OUTSIDE")
    if place is None:
        pytest.skip("needs the released files: set PROXYTUNE_OUTSIDE to the folder that holds density/")
    frame = read_dynamics(Path(place) / "density" / "dynamics_llama-16-16_5000steps.json")
    found = settle(frame, "llama-16-16", 3000)
    means = {row.group: round(row.mean, 5) for row in found.settled if row.metric == "top5pct_energy"}
    assert means == {"id": 0.27294, "ood_medium": 0.27347, "ood_hard": 0.27479}
    assert found.evaluations == 11
    assert isinstance(frame, pd.DataFrame)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be a JSON list of objects whose values are numbers"),
        ([{"step": 1, "id_acc": "high"}], "must be a JSON list of objects whose values are numbers"),
        ([{"step": 1, "id_acc": float("nan")}], "must be a JSON list of objects whose values are numbers"),
        ([{"step": 1, "id_speed": 2.0}], "must hold step and keys that end with top5pct_energy, .*, not 'step, id_speed'"),
        ([], "must hold step and keys"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_dynamics(write(tmp_path, content))


def test_the_command_prints_plain_numbers_and_draws(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS)
    arguments = ("probe", "density", "--dynamics", file, "--out", tmp_path / "out", "--format", "json")
    done = run_command(*arguments, "--from-step", "2")
    assert json.loads(done.stdout)["settled"][1]["mean"] == pytest.approx(0.265)
    assert (tmp_path / "out" / "density-dynamics.png").exists()
    refused = run_command(*arguments, "--from-step", "3")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--from-step: two evaluations or more are needed, 'dynamics' has 1 from step 3 on; its last is 3" in refused.stderr
