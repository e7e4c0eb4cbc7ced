"""What holds of every registered measure: a new one is tested by being there."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import STUDY, Unbroken, run_in_process, write_choice_task

from evals.data import data_for
from evals.display.cells import Table
from evals.display.drawing import draw as draw_chart
from evals.measures.inputs import Inputs
from evals.measures.measure import Measure, Reading, Settings
from evals.measures.registry import measures
from evals.measures.subjects import Outputs, Pair
from evals.records import Record
from evals.results.recorded import Recorded
from evals.results.summary import Results, read_results, result_charts, result_tables, summarize
from evals.running.jobs import keys_of, readings_of
from evals.running.runner import Finished
from evals.selection import choose
from evals.statistics.value import Value
from evals.study import Study
from probes.verdict import ALL_CLAUSES
from probes.world.ledger import items_of
from proxytune.member import Weights, load_member, load_members

MEASURES: dict[str, Measure] = measures()
SETTINGS: dict[str, dict[str, Any]] = {"recoverability": {"steps": 4}, "benchmark": {"tasks": ["people"], "limit": 30}}  # quick ones
OF_THE_BASE = ("novelty",)  # no other arm is asked
NAMES = pytest.mark.parametrize("name", MEASURES)


@dataclass(frozen=True)
class Whole:
    """A study of all measures; `copy` is a folder with the base once more, and an arm by that name."""

    study: Study
    out: Path
    copy: Path
    finished: Finished
    results: Results


def whole_study(copy: Path, **changes: Any) -> Study:
    arms = STUDY["arms"] | {"copy": {"kind": "direct", "path": str(copy)}}
    own = {"benchmark": SETTINGS["benchmark"] | {"folder": str(copy.parent / "tasks")}, "text": {"file": str(copy.parent / "text.jsonl")}}
    return Study.model_validate(STUDY | {"measures": list(MEASURES), "settings": SETTINGS | own, "arms": arms} | changes)


@pytest.fixture(scope="module")
def whole(unbroken: Unbroken, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The unbroken small study, with what it did not measure."""
    folder = tmp_path_factory.mktemp("contract")
    out, copy = folder / "out", folder / "copy"
    shutil.copytree(unbroken.out, out)
    shutil.copytree(out / "worlds" / "tiny" / "seed-0" / "base", copy)
    known = [
        item for item in items_of(pd.read_parquet(copy.parent / "out" / "worlds" / "tiny" / "seed-0" / "ledger.parquet"), "test") if item.popularity
    ]
    write_choice_task(
        folder / "tasks",
        "people",
        [{"text": item.statement, "choices": item.choices, "gold": item.choices.index(item.answer)} for item in known],
    )
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": item.statement}) + "\n" for item in known[:12]))
    study = whole_study(copy)
    finished = run_in_process(study, out)
    return Whole(study, out, copy, finished, summarize(study, finished.records, finished.costs))


def inputs_of(study: Study, out: Path) -> Inputs:
    run = study.runs[0]
    return Inputs(study, data_for(study, Path(), run, out / "worlds"), run.seed)


# --- what a measure is ---


@NAMES
def test_a_measure_is_what_the_seam_says(name: str) -> None:
    measure = MEASURES[name]
    assert measure.name == name == type(measure).__module__.rpartition(".")[2]
    assert measure.question.endswith("?") or "?" in measure.question
    assert issubclass(measure.settings, Settings)
    assert measure.settings() is not None  # a study file may leave all settings out
    assert is_dataclass(measure.summary) and measure.summary.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert measure.role in ("gain", "kept", None)
    assert set(measure.built_on) <= set(MEASURES) - {name}
    assert {need.partition(".")[0] for need in measure.needs} <= {"train", "test", "knowledge"}


@NAMES
def test_readings_are_frozen_and_hashable_and_equal_where_they_are_the_same(name: str, whole: Whole) -> None:
    inputs = inputs_of(whole.study, whole.out)
    readings, again = (MEASURES[name].readings(inputs, whole.study.settings_of(name)) for _ in range(2))
    assert readings and readings == again
    assert len({*readings, *again}) == len(readings)
    for reading in readings:
        assert isinstance(reading, Reading)
        assert type(reading).__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert isinstance(type(reading).version, int)
        assert reading.subject in (Outputs, Pair)
        assert reading.protocol(inputs) == reading.protocol(inputs_of(whole.study, whole.out))


@NAMES
def test_a_measure_shows_what_it_found(name: str, whole: Whole) -> None:
    """All that a measure needs is in the tiny world: it has a table or rows there, and verdicts by the rule only."""
    measure, summary = MEASURES[name], whole.results.measures[name]
    assert isinstance(summary, measure.summary)
    assert measure.tables(summary, whole.results.header) or measure.rows(summary)
    assert all(table.title and table.note and len(table.frame) for table in measure.tables(summary, whole.results.header))
    for row in measure.rows(summary):
        assert {"arm", "measure", "value", "low", "high", "n", "unparsed"} <= set(row)
        assert row["measure"].split("/")[0] == name
    for row in measure.verdicts(summary):
        assert row.arm.split(", ")[0] in {"all arms", *whole.study.arm_settings, *whole.study.worlds}
        assert all(ALL_CLAUSES[one.clause].claim == one.claim for one in row.clauses)


# --- identical models ---


def rows_of(found: Any) -> Iterator[Any]:
    """The rows of a summary that are of an arm."""
    if is_dataclass(found) and hasattr(found, "arm"):
        yield found
    elif is_dataclass(found):
        for part in fields(found):
            yield from rows_of(getattr(found, part.name))
    elif isinstance(found, tuple | list):
        for part in found:
            yield from rows_of(part)


def values_of(row: Any) -> dict[str, Value]:
    return {part.name: value for part in fields(row) if isinstance(value := getattr(row, part.name), Value)}


def names_of(row: Any) -> tuple[Any, ...]:
    """What a row is of besides its arm: its class and its words and whole numbers."""
    return (type(row), *(value for part in fields(row) if part.name != "arm" and isinstance(value := getattr(row, part.name), str | int)))


def differs(row: Any, of_base: dict[tuple[Any, ...], Any], shares: bool) -> list[str]:
    """The values of a row that are neither the base's own nor those of two equal models: no difference, a similarity of one, or none at all.

    Draws of `shares` have half a unit of luck of their own (see `bootstrap_means`): of these the values are equal, and no interval leaves zero out.
    """
    beside = of_base.get(names_of(row))
    wrong = []
    for name, value in values_of(row).items():
        of_beside = None if beside is None else getattr(beside, name)
        if shares:
            same = of_beside is not None and of_beside.value == value.value
            nothing = value.value == 0 and not value.excludes_zero()
        else:
            same = of_beside == value
            nothing = {value.value, value.low, value.high} <= {0.0, None}
        if not (same or nothing or (value.value == pytest.approx(1, abs=1e-12) and value.low in (None, value.value))):
            wrong.append(name)
    return wrong


@NAMES
def test_identical_models_give_exactly_zero(name: str, whole: Whole) -> None:
    """A proxy of alpha 0 and a copy of the base: what the base has they have, and every difference is 0. Twin: what was tuned differs."""
    rows = list(rows_of(whole.results.measures[name]))
    of_base = {names_of(row): row for row in rows if row.arm == whole.study.base_arm}
    if name == "lens":  # the base's own lens is the base's
        of_base |= {names_of(replace(row, lens="own")): row for row in of_base.values() if row.lens == "base"}
    same = [row for row in rows if row.arm in ("copy", "proxy@0")]
    assert {row.arm for row in same} >= {"copy"} or name in OF_THE_BASE
    shares = bool(MEASURES[name].rows(whole.results.measures[name]))
    assert {row: wrong for row in same if (wrong := differs(row, of_base, shares))} == {}
    tuned = [row for row in rows if row.arm == "full"]
    if any(values_of(row) for row in tuned):
        assert any(differs(row, of_base, shares) for row in tuned)


def test_identical_models_stand_level_in_what_is_compared_across_measures(whole: Whole) -> None:
    gaps = {row["arm"]: row for row in whole.results.compared["gap_closed"]}
    assert {gaps[arm]["value"] for arm in ("copy", "proxy@0")} <= {0.0, None}
    frontier = {row["arm"]: row for row in whole.results.compared["frontier"]}
    for part in ("gain", "kept"):
        for arm in ("copy", "proxy@0"):
            assert frontier[arm][part]["value"] == 0
            assert frontier[arm][part]["low"] <= 0 <= frontier[arm][part]["high"]
    assert any(frontier["full"][part]["value"] for part in ("gain", "kept"))


# --- batches ---


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    """Equal in all but the rounding of numbers."""
    assert type(one) is type(other), where
    if is_dataclass(one):
        for part in fields(one):
            assert_alike(getattr(one, part.name), getattr(other, part.name), f"{where}.{part.name}")
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), where
        for place, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_alike(first, second, f"{where}[{place}]")
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_alike(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-4, rel=1e-4), where
    else:
        assert one == other, where


FEW = ("base", "expert", "proxy@0", "proxy@1", "lora")


@pytest.fixture(scope="module")
def in_small_batches(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[Record]]:
    """Some arms of the study, read in other batches."""
    out = tmp_path_factory.mktemp("batches") / "out"
    shutil.copytree(whole.out, out, ignore=shutil.ignore_patterns("records"))
    arms = {name: STUDY["arms"][name] for name in ("base", "expert", "proxy", "lora")}
    study = whole_study(whole.copy, arms=arms, batch_size=7, batch_tokens=300)
    return study, run_in_process(study, out).records


@NAMES
def test_batches_and_padding_do_not_matter(name: str, whole: Whole, in_small_batches: tuple[Study, list[Record]]) -> None:
    study, records = in_small_batches
    before = [record for record in whole.finished.records if record.arm in FEW]
    assert {(record.arm, record.frame) for record in before} == {(record.arm, record.frame) for record in records}
    one, other = (Recorded(study, of).summary(name) for of in (before, records))
    assert_alike(one, other, name)
    assert MEASURES[name].rows(one) == MEASURES[name].rows(other)  # shares are equal, not nearly
    assert list(rows_of(one)) or name in OF_THE_BASE


# --- records ---


def test_what_is_recorded_is_not_read_again(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    for reading in readings_of(inputs_of(whole.study, whole.out)):
        monkeypatch.setattr(type(reading), "read", lambda *_: pytest.fail("read twice"))
    again = run_in_process(whole.study, whole.out)
    assert [(record.arm, record.frame, record.protocol) for record in again.records] == [
        (record.arm, record.frame, record.protocol) for record in whole.finished.records
    ]
    assert again.costs == whole.finished.costs


def test_a_new_version_of_a_reading_changes_its_own_keys_only(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(whole.study, whole.out)
    weights = {"base": Weights(inputs.data.base)}
    outputs = Outputs(load_members(weights), weights, {"base": {"base": 1.0}})
    pair = Pair("copy", outputs.members["base"], load_member(whole.copy))
    readings = readings_of(inputs)

    def keys() -> dict[Reading, dict[tuple[str, str], str]]:
        anew = inputs_of(whole.study, whole.out)  # one that no protocol was hashed with
        return {reading: keys_of(reading, outputs if reading.subject is Outputs else pair, anew) for reading in readings}

    before = keys()
    assert len({key for of_reading in before.values() for key in of_reading.values()}) == sum(map(len, before.values()))
    classes = {type(reading) for reading in readings}
    assert len(classes) > 5
    for one in classes:
        with monkeypatch.context() as patched:
            patched.setattr(one, "version", one.version + 1)
            after = keys()
        for reading in readings:
            assert before[reading].keys() == after[reading].keys()
            for place, key in before[reading].items():
                assert (after[reading][place] != key) == (type(reading) is one), (one, reading, place)
    assert keys() == before


# --- JSON ---

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def assert_same_text(one: Table, other: Table) -> None:
    """Cell by cell the same words, and numbers that are the same but for a last digit that was rounded twice."""
    assert (one.title, one.note, list(one.frame.columns)) == (other.title, other.note, list(other.frame.columns))
    for first, second in zip(one.frame.to_numpy().ravel(), other.frame.to_numpy().ravel(), strict=True):
        assert NUMBER.sub("#", first) == NUMBER.sub("#", second)
        for number, again in zip(NUMBER.findall(first), NUMBER.findall(second), strict=True):
            last = 10.0 ** -len(number.partition(".")[2])
            assert float(number) == pytest.approx(float(again), abs=1.01 * last if "e" not in number else 0.02 * float(number)), one.title


@pytest.fixture(scope="module")
def reread(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> Results:
    file = tmp_path_factory.mktemp("json") / "results.json"
    file.write_text(whole.results.json())
    return read_results(file)


@NAMES
def test_a_summary_survives_json(name: str, whole: Whole, reread: Results) -> None:
    measure, summary, again = MEASURES[name], whole.results.measures[name], reread.measures[name]
    assert_alike(summary, again, name)
    tables = [measure.tables(of, header) for of, header in ((summary, whole.results.header), (again, reread.header))]
    assert len(tables[0]) == len(tables[1])
    for one, other in zip(*tables, strict=True):
        assert_same_text(one, other)


def test_results_survive_json_and_their_figures_are_drawn(whole: Whole, reread: Results, tmp_path: Path) -> None:
    assert reread.json() == whole.results.json()
    assert reread.header == whole.results.header
    for one, other in zip(result_tables(replace(whole.results, measured=[])), result_tables(reread), strict=True):
        assert_same_text(one, other)
    charts = result_charts(reread)
    assert [chart.name for chart in charts] == [chart.name for chart in result_charts(whole.results)]
    assert len(charts) >= 8
    for chart in charts:
        for path in draw_chart(chart, tmp_path):
            assert path.stat().st_size > 5_000, path.name


def test_the_row_direct_is_shown_by_every_measure_as_the_arm_that_was_selected(whole: Whole, tmp_path: Path) -> None:
    study = whole_study(whole.copy, direct=["best", "lora"])
    records = [*whole.finished.records, *(replace(record, arm="direct") for record in whole.finished.records if record.arm == "full")]
    costs = whole.finished.costs | {"direct": whole.finished.costs["full"]}
    choices = {study.runs[0]: choose(study, {"base": 0.0, "full": 1.0, "lora": 0.5})}
    results = summarize(study, records, costs, choices)
    assert results.compared["selections"][0]["chosen"] == "full"
    (tmp_path / "results.json").write_text(results.json())
    assert read_results(tmp_path / "results.json").json() == results.json()
    assert result_charts(results)
    found = 0
    for table in result_tables(replace(results, compared=results.compared | {"against_direct": [], "gap_closed": [], "selections": []})):
        rows = {name: table.frame[table.frame.iloc[:, 0] == name].iloc[:, 1:].to_numpy().tolist() for name in ("direct", "full")}
        assert rows["direct"] in ([], rows["full"]), table.title
        found += rows["direct"] != []
    assert found >= 5
