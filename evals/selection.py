"""Selects one value of a sweep on validation items that are held out of tuning. The test items are not used."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from evals.data import StudyData
from evals.measures.registry import measures
from evals.study import ArmSpec, Direct, Proxy, Study
from finetune.items import hold_out
from finetune.recipe import Tuning


@dataclass(frozen=True)
class Choice:
    """What was selected for one arm, the validation scores of the candidates (and of the arm to match), and the costs of the trials."""

    arm: str
    label: str
    tuning: Tuning
    scores: Mapping[str, float]
    trials: Sequence[Mapping[str, Any]]

    def __str__(self) -> str:
        scores = ", ".join(f"{label} {score:.3f}" for label, score in self.scores.items())
        return f"{self.arm}: selected {self.label} by validation ({scores})"


def trial_study(study: Study) -> Study:
    """The study of the trials: the candidates as arms, with the arms that they are to match, measured at the task only."""
    wanted: dict[str, ArmSpec] = {study.base_arm: study.arms[study.base_arm]}
    for name, arm in study.arms.items():
        if isinstance(arm, Direct) and arm.select is not None:
            wanted[name] = arm.model_copy(update={"select": None})
            if arm.matched is not None:
                matched = study.arm_settings[arm.matched].arm
                wanted[matched] = study.arms[matched]
                if isinstance(study.arms[matched], Proxy):
                    wanted[study.expert_of(matched)] = study.arms[study.expert_of(matched)]
    left_out = {"arms", "measures", "settings", "direct", "contrasts"}
    return Study.model_validate(study.model_dump(exclude=left_out) | {"arms": wanted, "measures": (gain_of(study),)})


def gain_of(study: Study) -> str:
    """The measure that says how good an arm is at what it is tuned for: the study's first one, or the first of all."""
    gains = [name for name, measure in measures().items() if measure.role == "gain"]
    return next((name for name in study.measures if name in gains), gains[0])


def trial_data(study: Study, data: StudyData, seed: int) -> StudyData:
    """The data of the trials: the training items without the validation items, and these as test. Raises `UserError` if there are too few items."""
    fit, held_out = hold_out(data.train, study.validation_share, seed)
    return replace(data, train=fit, test=held_out, knowledge=())


def select(arm: Direct, name: str, scores: Mapping[str, float], costs: Mapping[str, Mapping[str, Any]]) -> Choice:
    """Selects the candidate with the best score, or with the score nearest to that of the arm to match. In a tie the first value wins."""
    candidates = arm.settings(name)
    aim = 1.0 if arm.matched is None else scores[arm.matched]
    label = min(candidates, key=lambda candidate: abs(scores[candidate] - aim))
    shown = [*candidates, *([] if arm.matched is None else [arm.matched])]
    tuning = candidates[label][1]
    assert tuning is not None
    return Choice(name, label, tuning, {each: scores[each] for each in shown}, [costs[candidate] for candidate in candidates])


def score_of(items: pd.DataFrame) -> float:
    """The share of right answers, with the same weight for each unit."""
    return float(items.groupby("unit")["right"].mean().mean())
