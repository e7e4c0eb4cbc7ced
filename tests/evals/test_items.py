from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from helpers import run_command

from evals.display.render import draw
from evals.records import Record
from evals.results.items import FILE, all_items, read_items_of, side_by_side, write_items
from proxytune.errors import UserError


def record(arm: str, right: list[bool], unparsed: list[bool], seed: int = 0, frame: str = "task") -> Record:
    items = pd.DataFrame({"unit": ["a", "b", "c", "c"], "question": ["a?", "b?", "c?", "c?"], "answer": ["1", "2", "3", "4"]})
    texts = [f"{arm}-{seed}-{place}" for place in range(4)]
    return Record(arm, frame, None, seed, "", items.assign(text=texts, right=right, unparsed=unparsed))


T, F = True, False
RECORDS = [
    record("full", [T, T, F, F], [F, F, F, T]),
    record("proxy@1", [T, F, T, F], [F, F, F, F]),
    record("full", [F, T, F, F], [F, F, F, F], seed=1),
    record("proxy@1", [T, F, T, F], [F, T, F, F], seed=1),
    record("full", [T, T, T, T], [F, F, F, F], frame="knowledge"),
    Record("full", "states", None, 0, "", pd.DataFrame({"metric": ["effective_rank"], "site": ["pre"], "place": [0], "state": [0], "value": [1.0]})),
]


def asked(where: str, limit: int = 9, measure: str = "task") -> list[tuple[str, ...]]:
    table = side_by_side(all_items(RECORDS), measure, where, limit)
    return [tuple(row) for row in table.frame.itertuples(index=False)]


def test_items_on_which_arms_part_stand_side_by_side() -> None:
    assert asked("full right, proxy@1 wrong") == [
        ("0", "b?", "2", "✓ full-0-1", "✗ proxy@1-0-1"),
        ("1", "b?", "2", "✓ full-1-1", "✗ proxy@1-1-1"),
    ]
    assert asked("proxy@1 right, full wrong") == [
        ("0", "c?", "3", "✓ proxy@1-0-2", "✗ full-0-2"),
        ("1", "a?", "1", "✓ proxy@1-1-0", "✗ full-1-0"),
        ("1", "c?", "3", "✓ proxy@1-1-2", "✗ full-1-2"),
    ]
    assert asked("full unparsed") == [("0", "c?", "4", "✗ full-0-3")]
    assert len(asked("")) == 8
    assert asked("", measure="knowledge") == [
        ("0", q, a, f"✓ full-0-{n}") for n, (q, a) in enumerate(zip(["a?", "b?", "c?", "c?"], "1234", strict=True))
    ]


def test_long_lists_are_cut_and_said() -> None:
    table = side_by_side(all_items(RECORDS), "task", "full wrong", 2)
    assert len(table.frame) == 2
    assert table.note.startswith("5 of 8 items, the first 2 shown")
    assert "✗ full-0-2" in draw([table], "table", 100)


@pytest.mark.parametrize(
    ("measure", "where", "words"),
    [
        ("tasks", "", "--measure: there is none called 'tasks'; there are task, knowledge"),
        ("task", "lora right", "--where: there is no arm 'lora'; there are full, proxy@1"),
        ("task", "full good", "--where: 'full good' does not end in right, wrong, unparsed"),
    ],
)
def test_mistakes_are_named(measure: str, where: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        asked(where, measure=measure)


def test_the_file_is_read_as_it_was_written_and_missed_in_one_line(tmp_path: Path) -> None:
    pd.testing.assert_frame_equal(pd.read_parquet(write_items(RECORDS, tmp_path)), all_items(RECORDS))
    pd.testing.assert_frame_equal(read_items_of(tmp_path), all_items(RECORDS))
    with pytest.raises(UserError, match=f"holds no {FILE}"):
        read_items_of(tmp_path / "none")


def test_a_file_of_an_older_version_is_one_line_that_says_so(tmp_path: Path) -> None:
    all_items(RECORDS).drop(columns="world").rename(columns={"reading": "measurement"}).to_parquet(tmp_path / FILE)
    done = run_command("items", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert (
        line
        == f"proxytune: error: folder: '{tmp_path / FILE}' is of an older version (its column reading was called measurement); run the study again"
    )
    write_items(RECORDS, tmp_path)
    assert run_command("items", tmp_path, "--where", "full unparsed").returncode == 0


def test_worlds_do_not_run_into_one_another() -> None:
    """Two worlds may ask the same question under the same seed: their rows stay apart."""
    both = [replace(one, world=world) for one in RECORDS for world in ("a", "b")]
    assert all_items(both)["world"].value_counts().to_dict() == {"a": 20, "b": 20}
    table = side_by_side(all_items(both), "task", "full unparsed", 9)
    assert [row[:-1] for row in table.frame.itertuples(index=False)] == [("a", "0", "c?", "4"), ("b", "0", "c?", "4")]


def test_items_show_how_popular_they_are_and_older_files_do_without(tmp_path: Path) -> None:
    """In a world the popularity is the exposure. Twin: where it is not known there is no such column."""
    known = [replace(one, items=one.items.assign(popularity=[0.0, 3.0, 30.0, 66078000.0])) for one in RECORDS[:2]]
    write_items(known, tmp_path)
    table = side_by_side(read_items_of(tmp_path), "task", "", 9)
    assert list(table.frame.columns) == ["seed", "question", "answer", "popularity", "full", "proxy@1"]
    assert table.frame["popularity"].tolist() == ["0", "3", "30", "66078000"]
    assert "popularity" not in side_by_side(all_items(RECORDS), "task", "", 9).frame
    all_items(known).drop(columns=["popularity", "tuning"]).to_parquet(tmp_path / FILE)
    older = side_by_side(read_items_of(tmp_path), "task", "", 9).frame
    assert older.equals(table.frame.drop(columns="popularity"))


def test_tunings_of_one_seed_do_not_run_into_one_another() -> None:
    twice = [*RECORDS, *(replace(one, tuning=1) for one in RECORDS)]
    table = side_by_side(all_items(twice), "task", "full unparsed", 9)
    assert [row[:4] for row in table.frame.itertuples(index=False)] == [("0", "0", "c?", "4"), ("0", "1", "c?", "4")]
