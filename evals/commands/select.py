"""`proxytune select`: selects a study's settings beforehand, on families of other seeds, and prints what the study file is to say of them."""

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from evals.measures.shares import can_be_known
from evals.records import Record
from evals.running.progress import Display
from evals.running.runner import run_study
from evals.selection import check_selection, choose, score_of, selection_key, trial_study
from evals.study import Study
from proxytune.errors import UserError
from proxytune.files import check_writable

DIGITS = 4  # of scores: choices are made by what is printed


def select_and_show(study: Study, folder: Path, out: Path, seeds: Sequence[int], jobs: int | None, patient: bool) -> None:
    """Runs the trials on the families of `seeds`, with all tuning items and scored on all test items, and prints the block `selected` as YAML.

    Raises `UserError` for a study in which nothing is selected or that has no worlds, and for seeds that occur twice or are the study's own.
    """
    gc.freeze()  # trainers collect garbage often; they need not look through the libraries each time
    trials = family_study(study, seeds)
    check_writable(out / "study.json", "out")
    with Display() as display:
        finished = run_study(trials, folder, out, display, jobs=jobs, patient=patient)
        display.say("Put these lines into the study file, in place of earlier ones:")
    print(selected_block(study, seeds, finished.records), end="")


def family_study(study: Study, seeds: Sequence[int]) -> Study:
    """The trials as a study of the families of `seeds`: the candidates as arms, measured at the task."""
    if not study.selecting and not study.selects_direct:
        raise UserError("study: no arm has select, and direct is not best; there is nothing to select")
    check_selection(study)
    if not study.worlds:
        raise UserError("study: it has data of its own, all of which is in its tables; leave settings to be selected while it runs")
    if len(set(seeds)) < len(seeds):
        raise UserError("--seed: the seeds must differ")
    if common := sorted({*seeds} & {*study.seeds}):
        raise UserError(f"--seed: {common[0]} is one of the study's seeds; give seeds of families that are in no table")
    return Study.model_validate(trial_study(study).model_dump() | {"seeds": tuple(seeds)})


def selected_block(study: Study, seeds: Sequence[int], records: Sequence[Record]) -> str:
    """The block `selected` of the study file, from the records of `family_study`."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record.arm, []).append(score_of(record.items[can_be_known(record.items)]))
    scores = {arm: round(float(np.mean(of_arm)), DIGITS) for arm, of_arm in found.items()}
    block = {
        "worlds": list(study.worlds),
        "seeds": list(seeds),
        "key": selection_key(study),
        "chosen": {name: choice.label for name, choice in choose(study, scores).items()},
        "scores": scores,
    }
    return str(yaml.safe_dump({"selected": block}, sort_keys=False, default_flow_style=None, width=140))
