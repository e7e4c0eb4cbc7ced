"""Other people's frontiers: what is read, what is dominated, and how often it is said wrongly."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals import cli
from evals.display.drawing import draw as draw_chart
from evals.released.frontiers import Row, find_frontier, frontier_chart, frontier_tables, read_rows
from proxytune.errors import UserError


def rows(*settings: tuple[str, float, float], n: int = 1000) -> list[Row]:
    return [Row(name=name, gain=gain, loss=loss, n=n) for name, gain, loss in settings]


def test_a_setting_is_dominated_by_those_that_are_better_at_one_and_no_worse_at_the_other() -> None:
    found = find_frontier(rows(("a", 0.5, 0.2), ("b", 0.4, 0.1), ("c", 0.4, 0.2), ("twin of a", 0.5, 0.2), ("d", 0.1, 0.3)))
    assert {setting.name: set(setting.dominated_by) for setting in found.settings} == {
        "a": set(),
        "twin of a": set(),
        "b": set(),
        "c": {"a", "twin of a", "b"},
        "d": {"a", "twin of a", "b", "c"},
    }
    assert [setting.name for setting in found.settings] == ["a", "twin of a", "b", "c", "d"]
    titles = [table.title for table in frontier_tables(found, "x")]
    assert titles == ["x: dominated by none, 3 of 5", "x: dominated by another, 2 of 5", "Over all settings"]


def test_more_items_tell_settings_apart_and_settle_the_frontier() -> None:
    few, many = (find_frontier(rows(("a", 0.52, 0.1), ("b", 0.50, 0.1), n=n)) for n in (100, 100_000))
    assert [setting.alike for setting in few.settings] == [1, 1]
    assert [setting.alike for setting in many.settings] == [0, 0]
    assert 0.3 < few.settings[1].share_of_draws < 0.5
    assert many.settings[1].share_of_draws < 0.01


def test_equal_settings_are_told_apart_in_one_of_twenty_tables() -> None:
    """Under the null, drawn as the rule assumes: independent answers; twin: settings ten points apart."""
    draw = np.random.default_rng(0)

    def told_apart(first: float, second: float) -> float:
        tables = [rows(("a", draw.binomial(500, first) / 500, 0.1), ("b", draw.binomial(500, second) / 500, 0.2), n=500) for _ in range(200)]
        return float(np.mean([find_frontier(table).settings[0].alike == 0 for table in tables]))

    assert told_apart(0.4, 0.4) <= 0.09
    assert told_apart(0.4, 0.55) > 0.9


def test_a_share_of_loss_has_an_interval_where_its_items_are_known() -> None:
    with_items = [Row(name="a", gain=0.5, loss=0.1, n=100, loss_n=50), Row(name="b", gain=0.4, loss=0.11, n=100, loss_n=50)]
    found = find_frontier(with_items)
    assert found.settings[0].loss.low is not None
    assert 0.01 < found.settings[1].share_of_draws < 1  # the loss may be the other way round
    assert find_frontier(rows(("a", 0.5, 0.1))).settings[0].loss.low is None


def result(accuracy: float, forgetting: float | None, status: str = "success") -> dict[str, Any]:
    last = {"test accuracy": accuracy} | ({} if forgetting is None else {"forgetting": forgetting})
    return {"train_info": {"status": status, "num_trainable_params": 100, "metrics": [{"valid accuracy": 0.1}, last]}}


def test_a_folder_of_results_is_read_and_what_did_not_finish_is_counted(tmp_path: Path) -> None:
    for name, content in {"a": result(0.5, 0.1), "b": result(0.4, 0.2), "old": result(0.4, None), "failed": result(0.4, 0.1, "failed")}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found, left_out = read_rows(tmp_path)
    assert [(row.name, row.gain, row.loss, row.n, row.parameters) for row in found] == [("a", 0.5, 0.1, 1319, 100), ("b", 0.4, 0.2, 1319, 100)]
    assert left_out == 2
    assert "2 did not finish" in frontier_tables(find_frontier(found, left_out), "x")[0].note


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,gain,loss\na,0.5,0.1\n", "has no column n; it must have name, gain, loss and n"),
        ("name,gain,loss,n\na,50,0.1,10\n", r"gain of row 1 of '.*': Input should be less than or equal to 1, not 50"),
        ("name,gain,loss,n\na,0.5,0.1,10\na,0.4,0.1,10\n", "has two rows named 'a'"),
        ("name,gain,loss,n\n", "holds no finished result"),
        ("", "cannot be read as CSV"),
    ],
)
def test_a_file_of_another_form_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_rows(path)


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(UserError, match=r"x.json' is no result of PEFT"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match="is not there; give a folder"):
        read_rows(tmp_path / "absent")


def test_the_figure_names_the_best_and_is_drawn(tmp_path: Path) -> None:
    found = find_frontier(rows(("a", 0.5, 0.2), ("b", 0.4, 0.1), ("c", 0.3, 0.3)))
    chart = frontier_chart(found, "x")
    names = {name for panel in chart.panels for mark in panel.marks for name in getattr(mark, "names", ()) if name}
    assert names == {"a", "b"}
    assert draw_chart(chart, tmp_path)


def test_the_command_prints_tables_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("name,gain,loss,n\na,0.5,0.1,100\nb,0.4,0.2,100\n")
    monkeypatch.setattr("sys.argv", ["proxytune", "frontier", str(tmp_path / "x.csv"), "--out", str(tmp_path / "out"), "--format", "json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert [setting["dominated_by"] for setting in json.loads(capsys.readouterr().out)["settings"]] == [[], ["a"]]
    assert (tmp_path / "out" / "frontier.png").exists()


OUTSIDE = Path(os.environ.get("PROXYTUNE_OUTSIDE", "absent")) / "peft" / "metamathqa_llama3.2-3b.csv"


@pytest.mark.skipif(not OUTSIDE.exists(), reason="PROXYTUNE_OUTSIDE names no folder of other people's files")
def test_the_table_of_peft_comes_out_as_counted_elsewhere() -> None:
    found = find_frontier(*read_rows(OUTSIDE))
    assert len(found.best) == 7
    assert found.correlations["gain and loss"].value == pytest.approx(-0.106, abs=5e-4)
    assert found.correlations["gain and log parameters"].value == pytest.approx(0.580, abs=5e-4)
    (full,) = [setting for setting in found.settings if setting.name.startswith("full-finetuning")]
    assert len(full.dominated_by) == 1
