"""A study as jobs: what each waits for, what is one job, and that planning looks at nothing."""

import builtins
import copy
import os
from typing import Any

import pytest
from helpers import STUDY

from evals.running.plan import Job, plan
from evals.study import Study

TUNING = {"method": "full", "learning_rate": 1e-3}
SWEPT = {"kind": "direct", "tuning": TUNING, "sweep": {"learning_rate": [1e-3, 1e-2]}}


def planned(**changes: Any) -> dict[str, Job]:
    """The jobs by name, in the plan's order."""
    study = Study.model_validate(copy.deepcopy(STUDY) | changes)
    jobs = plan(study)
    assert len({job.name for job in jobs}) == len(jobs)
    for place, job in enumerate(jobs):
        assert set(job.waits) <= {before.name for before in jobs[:place]}  # so that one process can take them as they stand
        assert job.tuned is None or job.tuned in job.waits
    return {job.name: job for job in jobs}


def with_arms(**arms: Any) -> dict[str, Any]:
    return {"base": {"kind": "base"}, **arms}


def test_each_model_is_tuned_once_and_each_group_is_read_once() -> None:
    jobs = planned()
    assert {name: job.waits for name, job in jobs.items()} == {
        "tiny, seed 0 · family": (),
        "tiny, seed 0 · tune expert": ("tiny, seed 0 · family",),
        "tiny, seed 0 · tune full": ("tiny, seed 0 · family",),
        "tiny, seed 0 · tune lora": ("tiny, seed 0 · family",),
        "tiny, seed 0 · read base": ("tiny, seed 0 · family",),
        "tiny, seed 0 · read expert": ("tiny, seed 0 · tune expert",),
        "tiny, seed 0 · read full": ("tiny, seed 0 · tune full",),
        "tiny, seed 0 · read lora": ("tiny, seed 0 · tune lora",),
    }
    assert [job.kind for job in jobs.values()] == ["family", "tune", "tune", "tune", "read", "read", "read", "read"]


def test_a_plan_looks_at_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.model_validate(STUDY)
    right = plan(study)

    def refuse(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"a file was looked at: {arguments}")

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "open", refuse)
        for name in ("open", "stat", "lstat", "scandir", "listdir", "mkdir", "replace", "unlink"):
            patched.setattr(os, name, refuse)
        with pytest.raises(AssertionError, match="looked at"):
            os.stat(".")
        assert plan(study) == right


def test_equal_tunings_are_one_job() -> None:
    jobs = planned(arms=with_arms(full={"kind": "direct", "tuning": TUNING}, same={"kind": "direct", "tuning": TUNING}, lora=SWEPT))
    tunings = [name for name, job in jobs.items() if job.kind == "tune"]
    assert tunings == ["tiny, seed 0 · tune full", "tiny, seed 0 · tune lora@0.01"]
    assert {job.tuned for name, job in jobs.items() if name.endswith((" read full", " read same", " read lora@0.001"))} == {tunings[0]}
    assert len([job for job in jobs.values() if job.kind == "read"]) == 5


@pytest.mark.parametrize(
    "other", [{"kind": "direct", "tuning": TUNING | {"learning_rate": 2e-3}}, {"kind": "expert", "tuning": TUNING}], ids=["setting", "start"]
)
def test_tunings_that_differ_are_not(other: dict[str, Any]) -> None:
    """The negative twin: another setting, and the small model tuned in the same way."""
    jobs = planned(arms=with_arms(full={"kind": "direct", "tuning": TUNING}, other=other))
    assert len([job for job in jobs.values() if job.kind == "tune"]) == 2


def test_a_selection_waits_for_the_trials_and_its_own_tuning_for_the_selection() -> None:
    arms = with_arms(
        expert={"kind": "expert", "tuning": TUNING},
        proxy={"kind": "proxy", "alpha": [1]},
        full={"kind": "direct", "tuning": TUNING},
        best=SWEPT | {"select": "best"},
        matched={"kind": "direct", "tuning": TUNING, "sweep": {"epochs": [0.5, 1]}, "select": {"match": "proxy@1"}},
    )
    jobs = planned(arms=arms, measures=["task", "density"], contrasts=[["best", "full"]])
    trials = [name for name, job in jobs.items() if job.trial]
    assert all("· trial ·" in name for name in trials)
    # The base, the candidates, and the arm that is to be matched, with its expert; `full` has no part in it.
    assert {job.group.label for job in jobs.values() if job.trial and job.kind == "read" and job.group is not None} == {
        "base",
        "expert",
        "best@0.001",
        "best@0.01",
        "matched@0.5",
        "matched@1",
    }
    reads = tuple(name for name in trials if jobs[name].kind == "read")
    select = jobs["tiny, seed 0 · select"]
    assert (select.kind, select.waits) == ("select", reads)
    for arm in ("best", "matched"):
        tune = jobs[f"tiny, seed 0 · tune {arm}"]
        assert (tune.tuning, tune.trial) == (None, False)
        assert select.name in tune.waits
        assert jobs[f"tiny, seed 0 · read {arm}"].tuned == tune.name
    assert not any("select" in name for name in jobs["tiny, seed 0 · tune full"].waits)
    assert {jobs[name].tuning for name in trials if jobs[name].kind == "tune"} >= {job.tuning for job in jobs.values() if job.tuning is not None}


def test_the_tuning_items_are_classified_once_and_only_arms_that_choose_among_them_wait_for_it() -> None:
    known = TUNING | {"items": "known"}
    arms = with_arms(
        known={"kind": "direct", "tuning": known},
        unknown={"kind": "direct", "tuning": TUNING | {"items": "unknown"}},
        full={"kind": "direct", "tuning": TUNING},
        best={"kind": "direct", "tuning": known, "sweep": {"learning_rate": [1e-3, 1e-2]}, "select": "best"},
    )
    jobs = planned(arms=arms, seeds=[0, 1])
    for seed in (0, 1):
        (classify,) = [job for job in jobs.values() if job.kind == "classify" and job.run.seed == seed]
        assert (classify.waits, classify.trial) == ((f"tiny, seed {seed} · family",), False)
        tunings = [job for job in jobs.values() if job.kind == "tune" and job.run.seed == seed]
        waiting = {job.name.rpartition(" ")[2] for job in tunings if classify.name in job.waits}
        assert waiting == {"known", "unknown", "best", "best@0.001", "best@0.01"}
        assert len(tunings) == len(waiting) + 1  # the twin: `full` does not wait


def test_two_selected_arms_of_one_sweep_are_two_tunings() -> None:
    """What they select is known only later: `match` and `best` may take different values."""
    arms = with_arms(full={"kind": "direct", "tuning": TUNING}, best=SWEPT | {"select": "best"}, matched=SWEPT | {"select": {"match": "full"}})
    jobs = planned(arms=arms)
    assert {"tiny, seed 0 · tune best", "tiny, seed 0 · tune matched"} <= set(jobs)
    assert len([job for job in jobs.values() if job.trial and job.kind == "tune"]) == 2  # two values, each tuned once; full is one of them


def test_worlds_and_seeds_are_one_axis() -> None:
    once = planned()
    jobs = planned(worlds=["tiny", "default"], seeds=[0, 3])
    assert list(dict.fromkeys((job.run.world, job.run.seed) for job in jobs.values())) == [("tiny", 0), ("tiny", 3), ("default", 0), ("default", 3)]
    assert len(jobs) == 4 * len(once)
    for job in jobs.values():
        assert all(jobs[name].run == job.run for name in job.waits)  # nothing of one run waits for another


def test_with_data_of_its_own_a_study_builds_no_family() -> None:
    given = {"worlds": [], "models": {"base": "b", "small": "s"}, "data": {"train": "t", "test": "t", "knowledge": "k"}}
    jobs = planned(**given, seeds=[0, 1], arms=with_arms(full={"kind": "direct", "tuning": TUNING}, given={"kind": "direct", "path": "p"}))
    assert {name: job.waits for name, job in jobs.items() if job.run.seed == 1} == {
        "seed 1 · tune full": (),
        "seed 1 · read base": (),
        "seed 1 · read full": ("seed 1 · tune full",),
        "seed 1 · read given": (),
    }
    assert jobs["seed 0 · read given"].tuned is None


def test_tunings_of_one_seed_share_what_is_not_tuned() -> None:
    """The family, the base and models that were tuned elsewhere are one job, whatever the number of tunings."""
    arms = with_arms(full={"kind": "direct", "tuning": TUNING}, given={"kind": "direct", "path": "elsewhere"}, best=SWEPT | {"select": "best"})
    jobs = planned(arms=arms, measures=["task"], tuning_seeds=3)
    shared = ("family", "read base", "trial · read base", "read given")
    assert [name for name in jobs if name.endswith(shared)] == [f"tiny, seed 0 · {name}" for name in (shared[0], shared[2], shared[1], shared[3])]
    for run in ("tiny, seed 0", "tiny, seed 0, tuning 1", "tiny, seed 0, tuning 2"):
        assert jobs[f"{run} · tune full"].waits == ("tiny, seed 0 · family",)
        assert jobs[f"{run} · read full"].waits == (f"{run} · tune full",)
        assert "tiny, seed 0 · trial · read base" in jobs[f"{run} · select"].waits
        assert all(name.startswith((run, "tiny, seed 0 · trial · read base")) for name in jobs[f"{run} · select"].waits)
    once = planned(arms=arms, measures=["task"])
    assert {name: job for name, job in jobs.items() if ", tuning " not in name} == once
