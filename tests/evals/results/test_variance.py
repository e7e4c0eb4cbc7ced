"""Where the variance of a study comes from, on studies with planted variances, and what a study can tell before it runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted import OWN, records_of, study_of
from scipy.stats import ttest_1samp

from evals.records import Record
from evals.results.recorded import Recorded
from evals.results.summary import read_results, result_tables, summarize
from evals.results.variance import _closed, components, excerpt, headline, known_variances, least, power_table, variance, variance_table
from evals.study import Run, Study
from proxytune.errors import UserError


def drawn(generator: np.random.Generator, families: int, tunings: int, *planted: float) -> list[np.ndarray]:
    """Units' values by family, of other numbers of persons in every family."""
    between, tuned, persons, answers = planted
    return [
        generator.normal(0, between)
        + generator.normal(0, tuned, (tunings, 1))
        + generator.normal(0, persons, (1, people := int(generator.integers(20, 60))))
        + generator.normal(0, answers, (tunings, people))
        for _ in range(families)
    ]


@pytest.mark.parametrize(
    "planted", [(1.0, 0.5, 3.0, 2.0), (0.0, 0.5, 3.0, 2.0), (1.0, 0.0, 3.0, 2.0), (1.0, 0.5, 0.0, 0.0), (0.0, 0.0, 3.0, 2.0)], ids=str
)
def test_planted_variances_are_found(planted: tuple[float, float, float, float]) -> None:
    """Without bias: on average over many studies, and those that are zero are zero. Twin: parts that are not subtracted are far too large."""
    between, tuned, persons, answers = planted
    generator = np.random.default_rng(0)
    studies = [drawn(generator, 6, 3, *planted) for _ in range(400)]
    found = [components(families) for families in studies]
    of_persons = np.mean([np.mean([(persons**2 + answers**2 / 3) / units.shape[1] for units in families]) for families in studies])
    for name, truth in (("family", between**2), ("tuning", tuned**2), ("persons", of_persons)):
        values = np.array([one[name] for one in found], float)
        assert values.mean() == pytest.approx(truth, abs=4 * values.std(ddof=1) / len(values) ** 0.5 + 1e-12), name
    if persons and not between:
        bare = np.mean([np.var([units.mean() for units in families], ddof=1) for families in studies])
        assert bare > 0.9 * of_persons  # what would have been taken for families


def test_the_parts_add_up_to_the_variance_of_the_mean() -> None:
    """One tuning a family: what tunings do is in `family`."""
    families = drawn(np.random.default_rng(1), 8, 1, 1.0, 1.0, 3.0, 2.0)
    parts = components(families)
    assert parts["tuning"] is None
    assert parts["family"] is not None and parts["persons"] is not None
    assert parts["family"] + parts["persons"] == pytest.approx(np.var([units.mean() for units in families], ddof=1))
    assert components([units[:, :1] for units in families]) == {"family": None, "tuning": None, "persons": None}
    assert components(families[:1])["family"] is None


def test_a_study_of_several_tunings_tells_its_three_parts_apart() -> None:
    study = study_of(20, tuning_seeds=3)
    found = []
    for seed in range(4):
        records = records_of(study, between=0.03, tuned=0.02, persons=0.1, answers=0.05, seed=seed)
        rows = {row["arm"]: row for row in variance(Recorded(study, records)) if not row["gap"]}
        assert list(rows) == headline(study) == ["proxy@1"]
        assert sum(rows["proxy@1"]["shares"].values()) == pytest.approx(1)
        found.append(rows["proxy@1"]["parts"])
    parts = pd.DataFrame(found).mean()  # of a difference of two arms: twice what was planted in each
    assert parts["family"] == pytest.approx(2 * 0.03**2, rel=0.6)
    assert parts["tuning"] == pytest.approx(2 * 0.02**2, rel=0.3)
    assert parts["persons"] == pytest.approx(2 * (0.1**2 + 0.05**2 / 3) / 20, rel=0.2)
    table = result_tables(summarize(study, records, {}))[-1]
    assert (table.title, "world and pretraining (%)" in table.frame, "tuning seed (%)" in table.frame) == ("Variance", True, True)
    assert "more test persons a family" in table.note


def test_with_one_tuning_family_and_tuning_are_one_part_and_it_is_said() -> None:
    study = study_of(6)
    rows = variance(Recorded(study, records_of(study, between=0.05, persons=0.1)))
    (table,) = variance_table(rows)
    assert "world, pretraining and tuning seed (%)" in table.frame
    assert "tuning_seeds: 2" in table.note
    assert variance_table(variance(Recorded(study_of(1), records_of(study_of(1), persons=0.1)))) == []


def test_what_is_below_zero_is_zero_and_marked() -> None:
    study = study_of(3)
    rows = next(rows for seed in range(20) if (rows := variance(Recorded(study, records_of(study, persons=0.2, seed=seed)))) and rows[0]["truncated"])
    assert (rows[0]["truncated"], rows[0]["parts"]["family"], rows[0]["shares"]["family"]) == (["family"], 0.0, 0.0)
    (table,) = variance_table(rows)
    assert "0*" in set(table.frame["world, pretraining and tuning seed (%)"])


def test_seeds_of_the_users_own_data_are_tunings_of_one_family() -> None:
    study = study_of(40, **OWN)
    (row, _) = variance(Recorded(study, records_of(study, people=50, tuned=0.02, persons=0.1, answers=0.05)))
    assert (row["families"], row["tunings"], row["parts"]["family"]) == (1, 40, None)
    assert row["parts"]["tuning"] == pytest.approx(2 * 0.02**2, rel=0.5)
    (table,) = variance_table([row])
    assert {"tuning seed (%)", "persons or items (%)"} <= set(table.frame)


def test_the_gap_closed_varies_as_its_ratio_does() -> None:
    """The linear approximation beside the spread of the ratio itself over many studies."""
    generator = np.random.default_rng(0)
    effects = np.array([0.6, 0.65, 0.2])[:, None, None]  # a proxy, direct, base
    ratios, spreads = [], []
    for _ in range(400):
        families = [effects + generator.normal(0, 0.03, (3, 1, 1)) + generator.normal(0, 0.1, (3, 1, 30)) for _ in range(8)]
        arm, direct, base = np.mean([family.mean(axis=(1, 2)) for family in families], axis=0)
        ratios.append((arm - base) / (direct - base))
        closed = _closed(families)
        assert closed is not None
        assert np.mean([units.mean() for units in closed]) == pytest.approx(ratios[-1])
        parts = components(closed)
        spreads.append((parts["family"] + parts["persons"]) / 8)  # type: ignore[operator]
    assert np.mean(spreads) == pytest.approx(np.var(ratios, ddof=1), rel=0.2)


# --- before anything runs ---


def test_the_least_difference_is_found_in_four_of_five_studies() -> None:
    """By the t test over simulated families. Twin: half of it is found far less often."""
    between, tuned, persons = 1.0, 0.5, 3.0
    row: Any = {"parts": {"family": between**2, "tuning": tuned**2, "persons": persons**2 / 40}}
    effect = least(row, 8, 2, False)
    assert effect is not None
    generator = np.random.default_rng(0)
    spread = (between**2 + tuned**2 / 2 + persons**2 / 40) ** 0.5
    for size, low, high in ((effect, 0.77, 0.83), (effect / 2, 0.1, 0.4)):
        found = ttest_1samp(size + spread * generator.normal(size=(8, 20000)), 0).pvalue < 0.05
        assert low < found.mean() < high
    more = [least(row, families, tunings, False) for families, tunings in ((16, 2), (8, 8), (8, 2))]
    assert None not in more
    assert more[0] < more[1] < more[2]  # type: ignore[operator]  # families are worth more than tunings here


def test_one_family_tells_by_its_persons_and_unknown_parts_tell_nothing() -> None:
    parts = {"family": 1.0, "tuning": None, "persons": 0.04}
    assert least({"parts": parts}, 1, 1, False) == pytest.approx(2.8 * 0.2, rel=0.01)
    assert least({"parts": parts | {"family": None}}, 8, 1, False) is None
    assert least({"parts": parts | {"persons": None}}, 1, 1, False) is None
    assert least({"parts": {"family": None, "tuning": 0.0, "persons": 0.04}}, 50, 1, True) == pytest.approx(2.8 * 0.2, rel=0.01)


def test_a_plan_says_what_the_study_will_tell_and_from_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an earlier run, else from what is shipped, else nothing."""
    study, shipped = study_of(8), tmp_path / "variances.json"
    monkeypatch.setattr("evals.results.variance.SHIPPED", shipped)
    none = power_table(study, tmp_path)
    assert set(none.frame["least difference found (points)"]) == {"unknown: run two seeds first"}
    pilot = tmp_path / "pilot"
    pilot.mkdir()
    results = summarize(study_of(4), records_of(study_of(4), between=0.02, persons=0.05), {})
    (pilot / "results.json").write_text(results.json())
    assert read_results(pilot / "results.json").compared["variance"]
    found = power_table(study, pilot)
    assert found.frame["measure"].tolist() == ["task", "gap closed, task"]
    assert "an earlier run in this folder (4 seeds)" in found.note
    shipped.write_text(json.dumps(excerpt(pilot / "results.json")))
    by_shipped = power_table(study, tmp_path)
    assert by_shipped.frame.equals(found.frame)
    assert "the study 'planted' (4 seeds), shipped" in by_shipped.note
    wider = power_table(study_of(4), tmp_path).frame["least difference found (points)"].astype(float)
    assert (wider > found.frame["least difference found (points)"].astype(float)).all()
    assert known_variances(study_of(8, worlds=["default"]), tmp_path) == ([], "")
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(UserError, match="holds no variances of one world"):
        excerpt(tmp_path / "none.json")
    (pilot / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be read as results of proxytune compare"):
        power_table(study, pilot)


# --- several tunings of one family ---


def test_tunings_of_one_family_are_averaged_before_all_else() -> None:
    """The same intervals as if each family had been tuned once with its tunings' mean. Twin: as if tunings were families, they are narrower."""
    study = study_of(4, tuning_seeds=3)
    records = records_of(study, between=0.05, tuned=0.02, persons=0.05)
    found = summarize(study, records, {})
    alike: dict[Any, list[Record]] = {}
    for one in records:
        alike.setdefault((one.seed, one.arm), []).append(one)
    means = {key: np.mean([one.items["right"] for one in of_arm], axis=0) for key, of_arm in alike.items()}
    once = [replace(of_arm[0], items=of_arm[0].items.assign(right=means[key])) for key, of_arm in alike.items()]
    expected = summarize(study_of(4), once, {})
    assert (found.rows, found.compared["gap_closed"]) == (expected.rows, expected.compared["gap_closed"])
    apart = Study.model_validate(study.model_dump() | {"seeds": list(range(12)), "tuning_seeds": 1})
    of_each = summarize(apart, [replace(one, seed=place // 4, tuning=0) for place, one in enumerate(records)], {})
    wide, narrow = (next(row for row in each.rows if row["arm"] == "full") for each in (found, of_each))
    assert wide["value"] == pytest.approx(narrow["value"], abs=1e-9)
    assert wide["high"] - wide["low"] > 1.2 * (narrow["high"] - narrow["low"])


def test_tuning_seeds_are_the_runs_own_first_and_then_of_no_other_run() -> None:
    runs = [Run("tiny", seed, tuning) for seed in range(300) for tuning in range(20)]
    seeds = [run.tuning_seed for run in runs]
    assert [run.tuning_seed for run in runs if run.tuning == 0] == list(range(300))
    assert len(set(seeds)) == len(seeds)
    assert all(2**31 <= run.tuning_seed < 2**32 for run in runs if run.tuning)
    assert str(Run("tiny", 3, 1)) == "tiny, seed 3, tuning 1"
    assert Run("tiny", 3, 1).tuning_seed == Run("other", 3, 1).tuning_seed  # as seeds are the same in every world


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (OWN, "with your own data every seed is a tuning"),
        ({"measures": ["task", "density"]}, "density looks inside one tuned model"),
    ],
)
def test_where_several_tunings_have_no_sense_they_are_refused(changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        study_of(2, tuning_seeds=2, **changes)
