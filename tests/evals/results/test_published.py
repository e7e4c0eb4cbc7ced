"""Several studies in one table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Unbroken

from evals import cli
from evals.display.cells import cell
from evals.results.published import ABSENT, CONSTRUCTION, FOOTNOTES, NOISE, UNPARSED, published_table, read_runs
from evals.results.summary import Results
from evals.statistics.value import Value
from proxytune.errors import UserError


def with_gap(results: Results, value: float | None) -> Results:
    rows = [row | {"value": value, "low": value, "high": value} for row in results.compared["gap_closed"]]
    return replace(results, compared=results.compared | {"gap_closed": rows})


def test_every_number_stands_where_its_study_and_arm_are(unbroken: Unbroken) -> None:
    results = unbroken.results
    table = published_table({"a": with_gap(results, 0.5), "b": with_gap(results, None)})
    frame = table.frame.set_index(["study", "arm"])
    assert list(frame.loc["a"].index) == list(frame.loc["b"].index) == list(results.header.kinds)
    for row in results.rows:
        if row["measure"] in ("task", "knowledge"):
            shown = cell(Value(row["value"], row["low"], row["high"]), 100)
            assert frame.loc[("a", row["arm"]), row["measure"]].removesuffix(f" {UNPARSED}") == shown
    assert set(frame.loc["a"].drop(["base", "full"])["gap closed, task"]) == {"50 [50, 50]"}
    assert set(frame.loc["b"].drop(["base", "full"])["gap closed, task"]) == {f"n/a {NOISE}"}
    assert frame.loc[("a", "base"), "gap closed, task"] == f"0 {CONSTRUCTION}"
    assert frame.loc[("a", "full"), "gap closed, task"] == f"100 {CONSTRUCTION}"
    assert frame.loc[("a", "base"), "a token, x base"] == "1.00"


def test_only_the_footnotes_that_are_used_are_printed(unbroken: Unbroken) -> None:
    table = published_table({"a": with_gap(unbroken.results, 0.5)})
    assert FOOTNOTES[CONSTRUCTION] in table.note
    assert FOOTNOTES[NOISE] not in table.note
    assert FOOTNOTES[ABSENT] not in table.note
    assert FOOTNOTES[NOISE] in published_table({"a": with_gap(unbroken.results, None)}).note
    less = replace(unbroken.results, rows=[row for row in unbroken.results.rows if row["measure"] != "knowledge"])
    both = published_table({"a": less, "b": unbroken.results})
    assert both.frame["knowledge"].str.endswith(ABSENT).sum() == len(unbroken.results.header.kinds)
    assert FOOTNOTES[ABSENT] in both.note


@pytest.mark.parametrize(("share", "marked"), [(0.02, True), (0.0, False)])
def test_many_unparsed_answers_are_marked(unbroken: Unbroken, share: float, marked: bool) -> None:
    rows = [row | {"unparsed": int(share * row["n"])} for row in unbroken.results.rows]
    shown = published_table({"a": replace(unbroken.results, rows=rows)})
    assert shown.frame["task"].str.endswith(UNPARSED).all() == marked
    assert (FOOTNOTES[UNPARSED] in shown.note) == marked


def test_arms_are_chosen_in_their_order_and_an_unknown_one_is_named(unbroken: Unbroken) -> None:
    assert published_table({"a": unbroken.results}, ["full", "base"]).frame["arm"].tolist() == ["full", "base"]
    with pytest.raises(UserError, match="--arm: no study has an arm 'ful'; did you mean 'full'"):
        published_table({"a": unbroken.results}, ["ful"])


def test_the_command_reads_folders_with_or_without_a_name(
    unbroken: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "x=y"
    folder.mkdir()
    (folder / "results.json").write_text(unbroken.results.json())
    monkeypatch.setattr("sys.argv", ["proxytune", "tables", f"7B={folder}", str(folder), "--arm", "base", "--format", "json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    assert [(row["study"], row["arm"]) for row in json.loads(capsys.readouterr().out)] == [("7B", "base"), ("small", "base")]
    with pytest.raises(UserError, match="two studies called 'small'; name them: NAME=FOLDER"):
        read_runs([str(folder), str(folder)])
