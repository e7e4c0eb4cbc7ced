"""Released matrices of bias scores: which columns are models, what is printed, and the published one."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from evals.cli import app
from evals.released.scores import plain, read_scores, score_matrix, score_tables
from proxytune.errors import UserError

OUTSIDE = Path(os.environ.get("PROXYTUNE_OUTSIDE", "absent")) / "bias"
MODELS = [f"{base}-{data}-Seed-{seed}" for base in ("A-7B", "C") for data in ("x", "y") for seed in range(2)]


def write(folder: Path, columns: list[str], rows: int = 5) -> Path:
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(draw.standard_normal((rows, len(columns))), columns=columns, index=[f"bias {number}" for number in range(rows)])
    path = folder / "scores.csv"
    frame.rename_axis("bias").to_csv(path)
    return path


def test_columns_are_parsed_and_those_that_occur_once_are_left_out_with_the_reason(tmp_path: Path) -> None:
    matrix = read_scores(write(tmp_path, [*MODELS, "D-x", "A-7B-z", "notes", "C-x"]))
    assert matrix.labels["pretraining"].tolist() == ["A-7B"] * 4 + ["C"] * 5  # a missing seed is a seed
    assert matrix.labels["instruction"].tolist() == ["x", "x", "y", "y"] * 2 + ["x"]
    assert matrix.left_out == {"notes": "its name is not BACKBONE-DATA-Seed-N", "D-x": "D occurs once", "A-7B-z": "z occurs once"}
    assert matrix.profiles.shape == (9, 5)
    note = score_tables(score_matrix(matrix), "x")[0].note
    assert "D-x (D occurs once)" in note


def test_leaving_one_out_may_leave_another_alone(tmp_path: Path) -> None:
    matrix = read_scores(write(tmp_path, [*MODELS, "E-q", "E-w"]))  # q and w occur once, and then E does not occur
    assert set(matrix.left_out) == {"E-q", "E-w"}


def test_json_has_the_whole_numbers_in_their_places(tmp_path: Path) -> None:
    path = write(tmp_path, MODELS)
    done = CliRunner().invoke(app, ["probe", "bias", "--scores", str(path), "--leave-out", "bias 2", "--format", "json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert set(found) == {"silhouette", "calinski_harabasz", "davies_bouldin", "p", "permutations", "shares", "means", "stds"}
    for index in ("silhouette", "calinski_harabasz", "davies_bouldin"):
        assert set(found[index]) == set(found["p"][index]) == {"pretraining", "instruction"}
    assert set(found["shares"]) == {"pretraining", "instruction", "interaction", "seed"}
    assert found["permutations"] == 36
    frame = pd.read_csv(path, index_col=0)
    assert found["means"]["A-7B-x"]["bias 1"] == frame.loc["bias 1", ["A-7B-x-Seed-0", "A-7B-x-Seed-1"]].mean()
    assert found["stds"]["C-y"]["bias 4"] == pytest.approx(frame.loc["bias 4", ["C-y-Seed-0", "C-y-Seed-1"]].std(ddof=1), rel=1e-12)
    assert "bias 2" not in found["means"]["C-y"]


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    found = plain(score_matrix(read_scores(write(tmp_path, ["A-x", "A-y", "C-x", "C-y", "A-x-Seed-1"]))))
    assert set(found["stds"]["C-y"].values()) == {None}
    assert None not in found["stds"]["A-x"].values()
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bias,A-x,A-y,C-x,C-y\nb,1,2,3,four\n", r"row 'b', column 'C-y' of '.*' is 'four', no number"),
        ("bias,A-x,A-y,C-x,C-y\nb,1,2,3,4\nb,1,2,3,4\n", "two rows named 'b'"),
        ("bias,A-x,A-y\nb,1,2\n", "needs two backbones with 2 models each"),
        ("bias,A-x,A-y,C-x,C-y\n", "has no rows left"),
        ("", "cannot be read as CSV"),
    ],
)
def test_a_file_of_another_form_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_scores(tmp_path / "x.csv")


def test_a_row_that_is_not_there_is_named_and_the_measure_must_be_bias(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--leave-out: .* has no row 'bias 9'; did you mean"):
        read_scores(write(tmp_path, MODELS), ["bias 9"])
    done = CliRunner().invoke(app, ["probe", "density", "--scores", str(tmp_path / "scores.csv")])
    assert "belongs to the measure bias" in str(done.exception)


@pytest.mark.skipif(not OUTSIDE.exists(), reason="PROXYTUNE_OUTSIDE names no folder of other people's files")
def test_the_published_matrix_comes_out() -> None:
    matrix = read_scores(OUTSIDE / "cross_tuning_full_scores.csv")
    assert set(matrix.left_out) == {"Flan-T5", "OLMo-SFT"}
    found = plain(score_matrix(read_scores(OUTSIDE / "cross_tuning_full_scores.csv", ["MMLU"])))
    assert found["silhouette"]["pretraining"] == pytest.approx(0.104, abs=5e-4)
    assert [round(share, 3) for share in found["shares"].values()] == [0.197, 0.133, 0.112, 0.558]
    theirs = pd.read_csv(OUTSIDE / "model_bias_results_model_bias.csv").set_index("Model")
    compared = [
        (found[part][model][row], theirs.loc[model, f"{row}{suffix}"])
        for part, suffix in (("means", ""), ("stds", "_std"))
        for model in found["means"]
        for row in found["means"][model]
        if f"{row}{suffix}" in theirs
    ]
    assert len(compared) == 240
    assert all(ours == pytest.approx(printed, abs=5e-8) for ours, printed in compared)
