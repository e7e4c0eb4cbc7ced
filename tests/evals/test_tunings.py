"""Several tunings of one family, from the study to its results."""

from pathlib import Path

import pytest
from helpers import STUDY, place_world, run_in_process

from evals.results.items import all_items
from evals.results.summary import summarize
from evals.study import Study

ARMS = {name: arm for name, arm in STUDY["arms"].items() if name != "lora"}


@pytest.mark.slow
def test_more_tunings_of_a_family_keep_what_was_recorded_of_the_first(tiny_family: Path, tmp_path: Path) -> None:
    out = place_world(tiny_family, tmp_path)
    bias = {"bias": {"kind": "logit_bias", "tuning": {}}}
    once = Study.model_validate(STUDY | {"arms": ARMS | bias, "direct": "best", "measures": ["task", "knowledge", "forgetting"]})
    first = run_in_process(once, out)
    kept = {path: path.stat().st_mtime_ns for path in (out / "records").iterdir()}
    twice = Study.model_validate(once.model_dump() | {"tuning_seeds": 2})
    both = run_in_process(twice, out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert [one for one in both.records if one.tuning == 0 and one.arm == "full"] != []
    texts = {(one.arm, one.frame, one.tuning): one.items["text"].tolist() for one in both.records}
    for one in first.records:
        assert texts[one.arm, one.frame, 0] == one.items["text"].tolist()
    assert texts["base", "task", 1] == texts["base", "task", 0]
    assert texts["full", "task", 1] != texts["full", "task", 0]
    # Two members tuned twice, and the trials of `direct`; a bias has one best vector, whatever the seed.
    assert len([path for path in (out / "checkpoints").iterdir() if path.is_dir()]) == 4 + 2 + 1
    results = summarize(twice, both.records, both.costs)
    shares = {row["arm"]: row["value"] for row in results.rows if row["measure"] == "task"}
    of_each = [summarize(once, [one for one in both.records if one.tuning == tuning], {}) for tuning in (0, 1)]
    for arm in shares:
        of_arm = [row["value"] for each in of_each for row in each.rows if (row["measure"], row["arm"]) == ("task", arm)]
        assert shares[arm] == pytest.approx(sum(of_arm) / 2)
    assert {row["tunings"] for row in results.compared["variance"]} == {2}
    assert set(all_items(both.records)["tuning"]) == {0, 1}
