"""Results as tables, figures and JSON: they say what was measured, and nothing that was not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_summaries import EMPTY, HEADER, block_drifts, density, distances, exposures, results_of, whole

from evals.display.drawing import draw as draw_chart
from evals.display.render import draw
from evals.measures.density import BucketChange
from evals.measures.drift import Drifted
from evals.measures.recoverability import RecoverabilityFound, Recovered, RelearningCurve
from evals.results.summary import Results, read_results, result_charts, result_tables
from evals.statistics.value import Value
from proxytune.errors import UserError

SECTIONS: dict[str, tuple[str, Any, set[str]]] = {
    "exposure": ("density", density(exposure=exposures()), {"How density"}),
    "changes": ("density", density(changes=whole()["density"].changes), {"Erosion"}),
    "distances": ("drift", Drifted(distances(), ()), {"Drift from"}),
    "blocks": ("drift", Drifted((), block_drifts()), {"Drift from", "Drift of"}),
    "lens": ("lens", whole()["lens"], {"What the", "What a"}),
    "restoration": ("restoration", type(EMPTY["restoration"])(whole()["restoration"].parts, ()), {"Restoration:", "Restoration,", "Restoration of"}),
    "patching": ("restoration", type(EMPTY["restoration"])((), whole()["restoration"].patched), {"Patching:"}),
    "recoverability": ("recoverability", whole()["recoverability"], {"Recoverability:"}),
    "verdicts": ("erosion", whole()["erosion"], {"Verdict,"}),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_table_is_there_where_it_has_rows_and_nowhere_else(section: str) -> None:
    measure, summary, titles = SECTIONS[section]
    tables = result_tables(results_of(EMPTY | {measure: summary}))
    assert {next(title for title in titles if table.title.startswith(title)) for table in tables} == titles
    assert len(tables) == len(titles)
    assert all(len(table.frame) and table.note for table in tables)
    assert result_tables(results_of(EMPTY)) == []


def test_every_table_is_drawn_in_every_form_before_the_costs() -> None:
    costs = [{"arm": "base"} | dict.fromkeys(("runs", "steps", "tokens", "flops", "stored_bytes", "flops_a_token", "bytes_a_token"), 1.0)]
    tables = result_tables(results_of(whole(), costs))
    assert len(tables) == 1 + sum(len(titles) for _, _, titles in SECTIONS.values()) - 1  # distances and blocks share a table
    assert tables[-1].title == "Cost"
    for form in ("table", "markdown", "latex", "html"):
        text = draw(tables, form, 160)
        assert max(map(len, text.splitlines())) <= 160 or form != "table"
        assert "unchanged by construction" in text


def curves(count: int = 3) -> tuple[RelearningCurve, ...]:
    steps = (0, 1, 2, 4)
    return tuple(
        RelearningCurve(name, steps, tuple(Value(0.2 + 0.05 * step, 0.1, 0.6) for step in steps), Value(0.6))
        for name in ("forgotten", "never exposed", "unrelated")[:count]
    )


def drawable() -> Results:
    """Of everything that a figure shows, something."""
    buckets = tuple(
        BucketChange(arm, number, bucket, Value(value, value - 0.001, value + 0.001))
        for arm, value in (("full", 0.01), ("lora", 0.0))
        for number in range(5)
        for bucket in ("k=0", "k=3", "k=30")
    )
    found = whole()
    relearned = RecoverabilityFound((Recovered("full", Value(0.2), None, None, ("exact",), (1.0,), (2.0,), curves()),))
    return results_of(
        found | {"density": density(exposure=exposures(), changes=found["density"].changes, buckets=buckets), "recoverability": relearned}
    )


def test_what_was_measured_is_drawn_the_same_way_twice_and_nothing_else(tmp_path: Path) -> None:
    drawn = {}
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        drawn[run] = [path for chart in result_charts(drawable()) for path in draw_chart(chart, tmp_path / run)]
    names = {"density-change.png", "density-by-layer.png", "drift.png", "restoration.png", "lens.png", "recoverability.png"}
    assert {path.name for path in drawn["one"]} == names
    for one, two in zip(drawn["one"], drawn["two"], strict=True):
        assert one.stat().st_size > 10_000
        assert one.read_bytes() == two.read_bytes()
    assert result_charts(results_of(EMPTY)) == []
    assert [chart.name for chart in result_charts(results_of(EMPTY | {"drift": Drifted(distances(), ())}))] == ["drift"]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results, file = drawable(), tmp_path / "results.json"
    file.write_text(results.json())
    again = read_results(file)
    assert again.header == HEADER
    assert again.json() == results.json()
    assert result_charts(again)[0] != result_charts(results_of(EMPTY | {"drift": Drifted(distances(), ())}))[0]  # the twin
    for one, other in zip(result_tables(results), result_tables(again), strict=True):
        assert (one.title, one.note) == (other.title, other.note)
        np.testing.assert_array_equal(one.frame.to_numpy(), other.frame.to_numpy())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as results"),
        ("[]", "cannot be read as results"),
        ('{"study": "small", "rows": []}', "is of an older version"),
        ('{"schema": 3, "study": "small"}', "is not what proxytune compare writes"),
    ],
)
def test_what_is_no_results_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_results(tmp_path / "results.json")
    assert "\n" not in str(caught.value)
