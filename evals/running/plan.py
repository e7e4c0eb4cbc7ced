"""A study as jobs: what has to be done and what each job waits for. Pure: no files are read and no models are loaded.

For each run (a seed, in a world): find or pretrain the family; tune each model; load each group of arms and read it. Several tunings of one seed
share what is not tuned. Where an arm is tuned on known or unknown items only, a `classify` job asks the base first, once, and the tunings of such
arms wait for it. A setting that is selected on validation items adds its trials (tunings without the validation items, and readings of the task on
them) and a `select` job, for which the arm's own tuning waits (a proxy's reading, if its strength is selected). Settings that were selected
beforehand need no trials.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from evals.arms import Group, groups, selected_strengths, tunings
from evals.selection import check_selection, selects_here, trial_study
from evals.study import Run, Study
from finetune.recipe import BiasTuning, Tuning

Kind = Literal["family", "classify", "tune", "select", "read"]


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
    tuning: Tuning | BiasTuning | None = None
    tuned: str | None = None


def plan(study: Study) -> list[Job]:
    """All jobs of a study; each comes after those that it waits for. Raises `UserError` if what was selected beforehand does not fit the study."""
    check_selection(study)
    return list(dict.fromkeys(job for run in study.runs for job in _of_run(study, run)))  # what several tunings share is one job


def _of_run(study: Study, run: Run) -> Iterator[Job]:
    begin: tuple[str, ...] = ()
    if run.world is not None:
        family = Job(f"{run.first} · family", "family", run.first)
        yield family
        begin = (family.name,)
    if any(map(study.chooses_items, study.arms)):
        yield Job(_classify(run), "classify", run.first, begin, group=Group("base", study.base_arm, study.base_arm))
    selection: tuple[str, ...] = ()
    if selects_here(study):
        trials = list(_measured(trial_study(study), run, begin, trial=True))
        yield from trials
        select = Job(f"{run} · select", "select", run, tuple(job.name for job in trials if job.kind == "read"))
        yield select
        selection = (select.name,)
    yield from _measured(study, run, begin, selection, trial=False)


def _measured(study: Study, run: Run, begin: tuple[str, ...], selection: tuple[str, ...] = (), *, trial: bool) -> Iterator[Job]:
    """A tuning job for each different tuning, then a reading job for each group. `selection` is what selected settings wait for."""
    tuned: dict[tuple[object, ...], str] = {}
    made: dict[Group, str] = {}
    for group, tuning in tunings(study):
        waits = (*begin, *((_classify(run),) if study.chooses_items(group.arm) else ()), *(selection if tuning is None else ()))
        job = Job(_named(run, "tune", group, trial), "tune", run, waits, trial, group, tuning)
        same = (group.kind, tuning, study.lesson_of(group.arm)) if tuning is not None else (group.kind, group.label)
        if same not in tuned:
            yield job
        made[group] = tuned.setdefault(same, job.name)
    for group in groups(study):
        waits = (made[group],) if group in made else begin
        waits += selection if selected_strengths(study, group) else ()
        of = run.first if waits == begin else run
        yield Job(_named(of, "read", group, trial), "read", of, waits, trial, group, tuned=made.get(group))


def _named(run: Run, kind: Kind, group: Group, trial: bool) -> str:
    return f"{run} · {'trial · ' if trial else ''}{kind} {group.label}"


def _classify(run: Run) -> str:
    return f"{run.first} · classify the tuning items"
