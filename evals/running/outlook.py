"""`proxytune compare --plan`: which of a study's jobs are done, and an estimate of what the others cost. Nothing is tuned, read or written.

A tuning job passes its examples forwards and backwards, that of a bias once forwards; each step of a reading counts as one pass of a text. The
seconds are therefore rough: they separate minutes from hours.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from evals.arms import start_of, tuned_as, tuned_folder
from evals.display.cells import Table
from evals.measures.inputs import Inputs
from evals.running.jobs import Entry, Place, Read, arms_of, costs_of, inputs_of, keys_of, missing_of, opened, select_from, tuning_of, with_classified
from evals.running.plan import Job, plan
from evals.running.progress import Display
from evals.study import Study
from finetune.encoding import encode_examples, row_length
from finetune.items import items_to_tune_on
from finetune.recipe import Tuning
from probes.world.family import find_family
from proxytune.digests import is_whole
from proxytune.member import Weights, load_member

SAMPLE = (16, 32)  # texts and tokens of the pass that is timed
BACKWARD = 2  # a backward pass takes about as long as two forward passes


@dataclass(frozen=True)
class Outlook:
    """One job: what is already there (`all`, `none`, `3 of 8 records`), and an estimate of its tokens and seconds. None if it cannot be estimated,
    because its models or data are not there yet."""

    job: Job
    there: str
    tokens: int | None = None
    seconds: float | None = None


def outlook_table(study: Study, folder: Path, out: Path, display: Display) -> Table:
    """One row per job. Seconds are the number of tokens times the time that a forward pass takes now, in one process."""
    found = look_at(Place(study, folder, out), display)
    frame = pd.DataFrame(
        {
            "job": [one.job.name for one in found],
            "waits for": [f"{len(one.job.waits)} jobs" if len(one.job.waits) > 1 else "".join(one.job.waits) for one in found],
            "there": [one.there for one in found],
            "tokens (k)": ["" if one.tokens is None else f"{one.tokens / 1000:.0f}" for one in found],
            "seconds, about": ["" if one.seconds is None else f"{one.seconds:.1f}" for one in found],
        },
        dtype=str,
    )
    todo = [one for one in found if one.there != "all"]
    known = sum(one.seconds for one in todo if one.seconds is not None)
    unknown = sum(one.seconds is None for one in todo)
    later = f", and {unknown} jobs whose models or data are not there yet" if unknown else ""
    return Table(f"Plan of {study.study}", frame, f"{len(found)} jobs, {len(todo)} to do: about {known:.0f} seconds of one process{later}.")


def look_at(place: Place, display: Display) -> list[Outlook]:
    """Looks at every job in the plan's order. Loads each model that is there for its fingerprint, one group at a time."""
    outcomes: dict[str, Any] = {}
    found = []
    todo = plan(place.study)
    speeds: dict[str, float] = {}
    with display.bar("looking at what is there", len(todo)) as progress:
        for job in todo:
            found.append(_look_at(job, place, outcomes, speeds, display))
            progress(1)
    return found


def _look_at(job: Job, place: Place, outcomes: dict[str, Any], speeds: dict[str, float], display: Display) -> Outlook:
    """Looks at one job. If it is done, its outcome goes into `outcomes`, for the jobs that wait for it."""
    if job.kind == "family":
        assert job.run.world is not None
        if find_family(job.run.world, job.run.seed, place.worlds, checkpoints=place.study.reads_checkpoints) is None:
            return Outlook(job, "none")
        outcomes[job.name] = None
        return Outlook(job, "all")
    if any(name not in outcomes for name in job.waits):
        return Outlook(job, "none")
    if job.kind == "select":
        outcomes[job.name] = select_from(job, place, outcomes)
        return Outlook(job, "all")
    inputs = inputs_of(place, job)
    if job.kind == "tune":
        return _look_at_tuning(job, place, inputs, outcomes, speeds)
    return _look_at_reading(job, place, inputs, outcomes, speeds, display)


def _look_at_tuning(job: Job, place: Place, inputs: Inputs, outcomes: dict[str, Any], speeds: dict[str, float]) -> Outlook:
    assert job.group is not None
    data = with_classified(job, place, inputs.data, outcomes)
    tuning, start = tuning_of(job, outcomes), start_of(job.group, data)
    folder = tuned_folder(job.group, tuning, data, job.run.tuning_seed, place.out)
    if is_whole(folder):
        outcomes[job.name] = tuned_as(job.group, tuning, data, folder)
        return Outlook(job, "all")
    items = items_to_tune_on(data.train, tuning.items) if isinstance(tuning, Tuning) else data.train
    passed, passes = (tuning.passes(len(items)), 1 + BACKWARD) if isinstance(tuning, Tuning) else (1, 1)
    rows = encode_examples(items, inputs.tokenizer, inputs.data.prompt, inputs.data.ending)
    tokens = round(sum(map(row_length, rows)) * passed)
    return Outlook(job, "none", tokens, passes * tokens * _seconds_a_token(start, speeds))


def _look_at_reading(job: Job, place: Place, inputs: Inputs, outcomes: dict[str, Any], speeds: dict[str, float], display: Display) -> Outlook:
    there = records = tokens = 0
    entries = []
    costs: dict[str, Any] = {}
    for reading, subject in opened(job, place, inputs, outcomes, display):
        keys = keys_of(reading, subject, inputs)
        missing = missing_of(keys, place)
        records += len(keys)
        there += len(keys) - len(missing)
        tokens += SAMPLE[1] * reading.steps(subject.only(arms_of(missing)), inputs) if missing else 0
        entries += [Entry(label, frame, job.run, "", key) for (label, frame), key in keys.items()]
        costs |= costs_of(subject)
        del subject  # frees its memory for what is loaded next
    if there < records:
        base = Weights(inputs.data.base, field="models.base")
        return Outlook(job, f"{there} of {records} records", tokens, tokens * _seconds_a_token(base, speeds))
    outcomes[job.name] = Read(tuple(entries), costs)
    return Outlook(job, "all")


def _seconds_a_token(weights: Weights, speeds: dict[str, float]) -> float:
    """The seconds per token of a forward pass, timed once for each model."""
    if weights.path not in speeds:
        model = load_member(weights.path, field=weights.field).model
        ids = torch.ones(SAMPLE, dtype=torch.long)
        times = []
        for _ in range(3):
            before = time.perf_counter()
            with torch.inference_mode():
                model(input_ids=ids, use_cache=False)
            times.append(time.perf_counter() - before)
        speeds[weights.path] = min(times) / ids.numel()
    return speeds[weights.path]
