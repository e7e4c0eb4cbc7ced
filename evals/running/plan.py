"""A study as jobs: what has to be done and what each job waits for. Pure: no files are read and no models are loaded.

For each run (a seed, in a world): find or pretrain the family; tune each model; load each group of arms and read it. Several tunings of one seed
share what is not tuned. A setting that is
selected on validation items adds its trials (tunings without the validation items, and readings of the task on them) and a `select` job, for
which the arm's own tuning waits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from evals.arms import Group, groups, tunings
from evals.selection import trial_study
from evals.study import Direct, Run, Study
from finetune.recipe import Tuning

Kind = Literal["family", "tune", "select", "read"]


@dataclass(frozen=True)
class Job:
    """`name` is unique in the plan; `waits` are the names of the jobs that must end before this one starts.

    `trial` says that the job uses the validation items. `group` is what it tunes or reads. `tuning` is the recipe, None if it has yet to be
    selected. `tuned` is the job that makes the tuned model, None if there is no tuned model or it was tuned elsewhere.
    """

    name: str
    kind: Kind
    run: Run
    waits: tuple[str, ...] = ()
    trial: bool = False
    group: Group | None = None
    tuning: Tuning | None = None
    tuned: str | None = None


def plan(study: Study) -> list[Job]:
    """All jobs of a study; each job comes after those that it waits for."""
    return list(dict.fromkeys(job for run in study.runs for job in _of_run(study, run)))  # what several tunings share is one job


def _of_run(study: Study, run: Run) -> Iterator[Job]:
    begin: tuple[str, ...] = ()
    if run.world is not None:
        family = Job(f"{run.first} · family", "family", run.first)
        yield family
        begin = (family.name,)
    selecting = {name: arm for name, arm in study.arms.items() if isinstance(arm, Direct) and arm.select is not None}
    if selecting:
        trials = list(_measured(trial_study(study), run, begin, trial=True))
        yield from trials
        waits = tuple(job.name for job in trials if job.kind == "read")
        yield from (Job(_select(run, name), "select", run, waits, group=Group("direct", name, name)) for name in selecting)
    yield from _measured(study, run, begin, trial=False)


def _measured(study: Study, run: Run, begin: tuple[str, ...], *, trial: bool) -> Iterator[Job]:
    """A tuning job for each different tuning, then a reading job for each group.

    The reading of a selected setting waits for its selection too, whose trials count among the arm's costs.
    """
    tuned: dict[tuple[object, ...], str] = {}
    before: dict[Group, tuple[str, ...]] = {}
    for group, tuning in tunings(study):
        selection = () if tuning is not None else (_select(run, group.arm),)
        job = Job(_named(run, "tune", group, trial), "tune", run, (*begin, *selection), trial, group, tuning)
        same = (group.kind, tuning) if tuning is not None else (group.kind, group.label)
        if same not in tuned:
            yield job
        before[group] = (tuned.setdefault(same, job.name), *selection)
    for group in groups(study):
        waits, of = before.get(group, begin), run if group in before else run.first
        yield Job(_named(of, "read", group, trial), "read", of, waits, trial, group, tuned=waits[0] if group in before else None)


def _named(run: Run, kind: Kind, group: Group, trial: bool) -> str:
    return f"{run} · {'trial · ' if trial else ''}{kind} {group.label}"


def _select(run: Run, arm: str) -> str:
    return f"{run} · select {arm}"
