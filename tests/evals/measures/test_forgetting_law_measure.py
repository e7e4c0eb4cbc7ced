"""The law of forgetting, as a measure: planted studies where it is true, where steering leaves it, and where KL says nothing."""

from functools import cache
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
from planted import study_of
from pydantic import TypeAdapter

from evals.measures.forgetting_law import PROMPTS, ForgettingLaw, Laws
from evals.measures.knowledge import STATEMENTS
from evals.measures.measure import Settings
from evals.records import Record
from evals.results.header import header_of
from evals.results.recorded import Recorded
from evals.study import Study
from probes.verdict import SMALLEST_KNOWLEDGE

RATES = [1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 6e-4, 1e-3]
ARMS: dict[str, Any] = {
    "base": {"kind": "base"},
    "expert": {"kind": "expert", "tuning": {"method": "full", "learning_rate": 1e-3}},
    "proxy": {"kind": "proxy", "alpha": [0.25, 0.5, 0.75, 1]},
    "full": {"kind": "direct", "tuning": {"method": "full"}, "sweep": {"learning_rate": RATES}},
    "lora": {"kind": "direct", "tuning": {"method": "lora", "rank": 4}, "sweep": {"learning_rate": RATES}},
}
ITEMS = 400
Truth = Literal["law", "steered apart", "no law", "one arm", "one infinite"]


def law_study(families: int) -> Study:
    return study_of(families, arms=ARMS, measures=["forgetting_law"])


@cache
def summary(truth: Truth, families: int = 8, seed: int = 0) -> Laws:
    """Every arm has a KL of its own; knowledge lost is a quarter of it per nat, or has nothing to do with it."""
    draw = np.random.default_rng(seed)
    study = law_study(families)
    records = []
    arms = [arm for arm in study.arm_settings if arm != "base"]
    kls = {"base": 0.0} | dict(zip(arms, draw.uniform(0.05, 1.0, len(arms)), strict=True))
    kls["full@0.001"] = 1.0  # so that every steered arm is within reach
    kls["proxy@1"] = np.inf if truth == "one infinite" else kls["proxy@1"]
    unrelated = {arm: draw.uniform(0.0, 0.25) for arm in arms}
    for run in study.runs:
        for arm, kl in kls.items():
            lost = unrelated.get(arm, 0.0) if truth == "no law" else min(kl, 1.0) / 4
            lost -= 0.08 * (truth == "steered apart" and arm.startswith("proxy")) - 0.1 * (truth == "one arm" and arm == "lora@0.0004")
            common = {"unit": [str(place) for place in range(ITEMS)], "popularity": 1.0}
            right = (np.arange(ITEMS) < ITEMS * (0.7 - lost)) ^ (draw.random(ITEMS) < 0.02)
            known = pd.DataFrame(common | {"text": "", "unparsed": False, "right": right.astype(float)})
            records.append(Record(arm, STATEMENTS.name, run.world, run.seed, "p", known))
            for frame in PROMPTS:
                spread = pd.DataFrame(common | {"divergence": kl * draw.uniform(0.9, 1.1, ITEMS)})
                records.append(Record(arm, frame, run.world, run.seed, frame, spread))
    return ForgettingLaw().summarize(Recorded(study, records), Settings())


def test_a_law_that_holds_is_supported_and_one_that_does_not_is_refuted() -> None:
    assert {found.verdict for found in summary("law").verdicts} == {"supported"}
    assert {found.verdict for found in summary("no law").verdicts} == {"not supported"}
    for law in summary("law").laws:
        assert law.rank.value is not None
        assert law.rank.value > 0.95
        assert law.curve == pytest.approx((0.25, 0.0), abs=0.04)
    assert all(law.explained.value is not None and law.explained.value < 0.5 for law in summary("no law").laws)


def test_steered_arms_beside_the_curve_refute_it_and_the_distance_is_told() -> None:
    found = summary("steered apart")
    assert {one.verdict for one in found.verdicts} == {"not supported"}
    for law, verdict in zip(found.laws, found.verdicts, strict=True):
        assert law.steered.value == pytest.approx(-0.08, abs=0.01)
        assert [one.state for one in verdict.clauses][2:] == ["holds", "fails"]


def test_the_one_arm_that_leaves_the_curve_is_named_and_no_other() -> None:
    for truth, leaving in (("one arm", {"lora@0.0004"}), ("law", set())):
        assert {point.arm for point in summary(truth).points if point.leaves} == leaving
    point = next(point for point in summary("one arm").points if point.arm == "lora@0.0004")
    assert point.beyond.value == pytest.approx(0.1, abs=0.02)


def test_a_true_law_names_an_arm_wrongly_in_few_studies() -> None:
    """Holm's correction keeps the share of studies with any arm named wrongly at 5 %; what counts makes it fewer."""
    wrong = [any(point.leaves for point in summary("law", families=4, seed=seed).points) for seed in range(16)]
    assert sum(wrong) <= 1


def test_one_seed_describes_and_judges_nothing() -> None:
    found = summary("steered apart", families=1)
    assert {one.verdict for one in found.verdicts} == {"cannot tell: one seed"}
    assert not any(point.leaves for point in found.points)
    assert all(law.steered.low is None for law in found.laws)
    assert any(abs(point.beyond.value or 0.0) > SMALLEST_KNOWLEDGE for point in found.points)


def test_base_and_expert_and_arms_infinitely_far_are_no_points() -> None:
    arms, without = ({point.arm for point in summary(truth).points} for truth in ("law", "one infinite"))
    assert arms == {arm for arm in law_study(1).arm_settings if arm not in ("base", "expert")}
    assert arms - without == {"proxy@1"}
    assert {one.verdict for one in summary("one infinite").verdicts} == {"supported"}


def test_it_is_shown_with_its_curve_and_survives_json() -> None:
    found = summary("one arm")
    as_json = TypeAdapter(Laws).dump_json(found)
    assert TypeAdapter(Laws).validate_json(as_json) == found
    tables = {table.title.split(",")[0]: table for table in ForgettingLaw().tables(found, header_of(law_study(8)))}
    assert set(tables) == {"One law of forgetting?", "Arms and the curve", "Verdict"}
    assert tables["One law of forgetting?"].frame["arms that leave the curve"].tolist() == ["lora@0.0004"] * 2
