"""The comparison across measures, on records with planted effects."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from planted import OWN, records_of, study_of

from evals.results.comparison import compare, with_comparison
from evals.results.recorded import Recorded
from evals.results.summary import result_tables, summarize
from evals.statistics.power import MOST, needed_seeds


def compared(study: Any, **planted: Any) -> dict[str, Any]:
    return compare(Recorded(study, records_of(study, **planted)))


def difference(found: dict[str, Any], arm: str) -> dict[str, Any]:
    (row,) = (row for row in found["against_direct"] if row["arm"] == arm)
    return row


def test_open_rows_say_how_many_seeds_would_decide_and_decided_rows_do_not() -> None:
    study = study_of(4, contrasts=[["proxy@1", "expert"], ["proxy@1", "full"]])
    effects = {"base": 0.2, "expert": 0.3, "proxy@1": 0.64, "full": 0.65}
    found = compared(study, between=0.02, persons=0.02, effects=effects)
    row = difference(found, "proxy@1")
    assert row["low"] < 0 < row["high"]
    means = [each.items["right"].mean() for each in records_of(study, between=0.02, persons=0.02, effects=effects)]
    off = np.subtract(means[2::4], means[3::4])  # proxy@1 minus full in every family
    assert row["needs"]["of"] == "seeds"
    half = float(3.182 * off.std(ddof=1) / 2)
    assert row["needs"]["number"] == pytest.approx(needed_seeds(half, 4, row["value"]), rel=0.05)
    assert difference(found, "base")["needs"] is None
    assert [row["needs"] is None for row in found["contrasts"]] == [True, False]
    assert all(row["needs"] is None for row in found["gap_closed"])
    results = summarize(study, records_of(study, between=0.02, persons=0.02, effects=effects), {})
    tables = {table.title: table for table in result_tables(results)}
    task, contrasts = tables["Task"], tables["Contrasts"]
    shown = dict(zip(task.frame["arm"], task.frame["to decide Δ"], strict=True))
    assert shown == {"base": "", "expert": "", "proxy@1": f"{row['needs']['number']} seeds", "full": ""}
    assert "To decide Δ:" in task.note
    assert contrasts.frame["to decide, task"].tolist() == ["", shown["proxy@1"]]


def test_a_table_without_open_rows_has_no_such_column() -> None:
    study = study_of(4)
    results = summarize(study, records_of(study, between=0.001, persons=0.001), {})
    assert "to decide Δ" not in result_tables(results)[0].frame


def test_where_the_gap_is_open_it_says_what_would_decide_that() -> None:
    study = study_of(4)
    found = compared(study, between=0.1, effects={"base": 0.5, "expert": 0.5, "proxy@1": 0.5, "full": 0.52})
    gaps = found["gap_closed"]
    assert all(row["value"] is None and row["needs"]["of"] == "seeds" for row in gaps)
    results = summarize(study, records_of(study, between=0.1, effects={"base": 0.5, "expert": 0.5, "proxy@1": 0.5, "full": 0.52}), {})
    table = with_comparison(result_tables(results)[0], "task", found)
    assert table.frame.set_index("arm")["gap closed"]["proxy@1"].startswith("n/a (")


def test_one_seed_counts_units_and_the_same_items_in_every_seed_may_be_too_few() -> None:
    effects = {"base": 0.2, "expert": 0.3, "proxy@1": 0.64, "full": 0.65}
    once = difference(compared(study_of(1, **OWN), people=50, persons=0.1, effects=effects), "proxy@1")
    assert once["needs"]["of"] == "units"
    assert once["needs"]["number"] > 50
    several = difference(compared(study_of(5, **OWN), people=50, persons=0.1, effects=effects), "proxy@1")
    assert several["needs"]["of"] == "units"


def test_no_effect_is_not_decided_by_any_number() -> None:
    study = study_of(3)
    effects = {"base": 0.2, "expert": 0.3, "proxy@1": 0.65, "full": 0.65}
    alike = difference(compared(study, effects=effects), "proxy@1")
    assert (alike["low"], alike["high"], alike["needs"]) == (0, 0, None)
    records = [
        replace(one, items=one.items.assign(right=np.arange(20) % 2 == (one.arm == "full")).astype({"right": float})) for one in records_of(study)
    ]
    found = difference(compare(Recorded(study, records)), "proxy@1")
    assert found["value"] == 0
    assert found["needs"] == {"number": MOST["seeds"] + 1, "of": "seeds"}
