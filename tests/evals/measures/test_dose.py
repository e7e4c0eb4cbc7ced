"""The verdict on "exposure makes density", on planted records of a lesson and of a world."""

from typing import Any

import numpy as np
import pytest
from planted_names import ARMS, records_of, study_of

from evals.display.cells import Table
from evals.measures.density import Density
from evals.measures.dose import exposure_verdicts, names_verdicts
from evals.results.header import header_of
from evals.results.recorded import Recorded
from evals.statistics.judged import Verdict
from evals.study import Study

TUNING = {"method": "full", "learning_rate": 1e-3}
LESSONS = {"base": {"kind": "base"}} | {name: {"kind": "direct", "teach": name, "tuning": TUNING} for name in ("kept", "others")}
DENSER = {"residual": 1.5}  # planted in the middle third of the layers


def taught(seeds: int) -> Study:
    return study_of(data={"entities": "taught"}, arms=LESSONS, seeds=list(range(seeds)))


def judged(study: Study, shifts: dict[str, dict[str, float]], **options: Any) -> dict[str, Verdict]:
    records = Recorded(study, records_of(shifts, len(study.seeds), **options))
    return {row.arm: row for row in exposure_verdicts(records)}


def verdicts(study: Study, shifts: dict[str, dict[str, float]], **options: Any) -> dict[str, str]:
    return {arm: row.verdict for arm, row in judged(study, shifts, **options).items()}


def test_a_dose_that_is_planted_in_the_taught_arm_is_supported() -> None:
    # Neurons are judged in the high third, where nothing was planted.
    wanted = {"kept, residual": "supported", "kept, neurons": "not supported"}
    assert verdicts(taught(4), {"base": {}, "kept": DENSER, "others": {}}) == wanted


@pytest.mark.parametrize(
    "shifts",
    [
        {"base": DENSER, "kept": DENSER, "others": DENSER},  # what other names do as well
        {"base": {}, "kept": {}, "others": {}},
        {"base": {}, "kept": {"residual": -1.5}, "others": {}},  # the other sign
    ],
)
def test_without_an_effect_of_exposure_it_is_not_supported(shifts: dict[str, dict[str, float]]) -> None:
    assert verdicts(taught(4), shifts)["kept, residual"] == "not supported"


def test_one_seed_and_a_study_without_its_control_cannot_tell() -> None:
    assert verdicts(taught(1), {"base": {}, "kept": DENSER, "others": {}})["kept, residual"] == "cannot tell: one seed"
    alone = study_of(data={"entities": "taught"}, arms={name: arm for name, arm in LESSONS.items() if name != "others"}, seeds=[0, 1, 2, 3])
    row = judged(alone, {"base": {}, "kept": DENSER})["kept, residual"]
    assert (row.verdict, row.clauses[2].note) == ("underpowered", "no arm was taught other names")


def test_a_world_is_judged_beside_its_untrained_twin_and_cities_are_not_judged() -> None:
    world = study_of(worlds=["recall"], models=None, data=None, arms={"base": ARMS["base"]}, seeds=[0, 1, 2, 3])
    assert verdicts(world, {"base": DENSER}, world="recall")["base, residual"] == "supported"
    assert verdicts(world, {"base": {}}, world="recall")["base, residual"] == "not supported"
    assert verdicts(study_of(seeds=[0, 1, 2, 3]), {"base": DENSER, "full": {}}) == {}


ERODING = {"base": {"kind": "base"}, "full": {"kind": "direct", "tuning": TUNING}}
ERODING |= {"full-shuffled": {"kind": "direct", "tuning": TUNING | {"shuffled": True}}}


@pytest.mark.parametrize(
    ("shifts", "wanted"),
    [
        ({"base": DENSER, "full": {"residual": 0.5}, "full-shuffled": DENSER}, {"full, residual": "supported"}),
        ({"base": DENSER, "full": DENSER, "full-shuffled": DENSER}, {"full, residual": "not supported"}),
        # The shuffled answers do the same.
        ({"base": DENSER, "full": {"residual": 0.5}, "full-shuffled": {"residual": 0.5}}, {"full, residual": "not supported"}),
        ({"base": DENSER, "full": {"residual": 2.5}, "full-shuffled": DENSER}, {"full, residual": "not supported"}),
        # What the base does not show cannot be eroded.
        ({"base": {}, "full": {"residual": -0.5}, "full-shuffled": {}}, {}),
    ],
)
def test_erosion_at_names_is_judged_where_the_base_shows_them(shifts: dict[str, dict[str, float]], wanted: dict[str, str]) -> None:
    study = study_of(worlds=["recall"], models=None, data=None, arms=ERODING, seeds=[0, 1, 2, 3])
    records = Recorded(study, records_of(shifts, 4, world="recall"))
    assert {row.arm: row.verdict for row in names_verdicts(records)} == wanted


@pytest.mark.slow
def test_a_true_claim_is_seldom_refuted_and_an_absent_one_seldom_supported() -> None:
    """Thirty studies of four seeds each. The planted effect counts, if not by much."""
    found = {shift: [_verdict(shift, first) for first in range(0, 120, 4)] for shift in (0.75, 0.0)}
    assert np.mean([one == "not supported" for one in found[0.75]]) <= 0.1
    assert np.mean([one == "supported" for one in found[0.75]]) >= 0.5
    assert np.mean([one == "supported" for one in found[0.0]]) <= 0.05


def _verdict(shift: float, first: int) -> str:
    study = taught(4).model_copy(update={"seeds": tuple(range(first, first + 4))})
    records = records_of({"base": {}, "kept": {"residual": shift}, "others": {}}, seeds=first + 4, first=first)
    return next(row.verdict for row in exposure_verdicts(Recorded(study, records)) if row.arm == "kept, residual")


def test_the_tables_say_the_dose_by_exposure_and_the_rule() -> None:
    study = taught(2)
    records = Recorded(study, records_of({"base": {}, "kept": DENSER, "others": {}}, seeds=2))
    summary = Density().summarize(records, study.settings_of("density"))
    assert [one.clause for one in Density().verdicts(summary)[0].clauses] == ["dose", "trend", "dose/beside"]
    tables: dict[str, Table] = {each.title: each for each in Density().tables(summary, header_of(study))}
    dose = tables["Density at taught names by exposure (AUROC)"].frame.set_index("arm and site")
    assert list(dose.columns) == ["small", "big"]
    assert float(dose.loc["kept: residual, middle layers", "big"].split()[0]) > 0.75
    assert "(+" in dose.loc["kept: residual, middle layers", "big"]
    verdict = tables["Does exposure make density at names?"]
    assert verdict.frame.set_index("where").loc["kept, residual", "trend"].endswith(": holds")
    assert "minus others, which was taught other names" in verdict.note
