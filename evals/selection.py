"""Choosing a dial's value on validation items, as a user without the test would have to."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evals.material import Material
from evals.records import Record
from evals.study import ArmSpec, Direct, Proxy, Study
from finetune.items import hold_out

Measured = Callable[[Study, Material], list[Record]]


@dataclass(frozen=True)
class Choice:
    """What was chosen for one arm, the validation scores of the candidates and of what was to be matched, the trials' costs."""

    label: str
    scores: Mapping[str, float]
    trials: Sequence[Mapping[str, Any]]


def choose_dials(study: Study, material: Material, seed: int, measured: Measured) -> tuple[Study, dict[str, Choice]]:
    """The study with every dial that is to be chosen set to its choice, and the choices by arm.

    Candidates, and the points to be matched, are tuned without the validation items and asked those; ties go to the value
    that stands first. Raises `UserError` where there are too few items to hold any out.
    """
    undecided = {name: arm for name, arm in study.arms.items() if isinstance(arm, Direct) and arm.choose is not None}
    if not undecided:
        return study, {}
    fit, held_out = hold_out(material.train, study.validation_share, seed)
    inner = replace(material, train=fit, test=held_out, knowledge=())
    records = measured(_trial_study(study, undecided), inner)
    scores = {record.arm: float(record.items.groupby("unit")["right"].mean().mean()) for record in records}
    costs = {record.arm: record.cost for record in records}
    arms: dict[str, ArmSpec] = dict(study.arms)
    choices = {}
    for name, arm in undecided.items():
        candidates = arm.points(name)
        aim = 1.0 if arm.choose == "best" else scores[str(arm.choose)]
        label = min(candidates, key=lambda candidate: abs(scores[candidate] - aim))
        shown = [*candidates, *([] if arm.choose == "best" else [str(arm.choose)])]
        choices[name] = Choice(label, {point: scores[point] for point in shown}, [costs[candidate] for candidate in candidates])
        arms[name] = Direct(kind="direct", tuning=candidates[label][1])
    return study.model_copy(update={"arms": arms}), choices


def _trial_study(study: Study, undecided: Mapping[str, Direct]) -> Study:
    """The candidates as points, and the points that some of them are to match, measured at the task only."""
    wanted: dict[str, ArmSpec] = {study.base_arm: study.arms[study.base_arm]}
    for name, arm in undecided.items():
        wanted[name] = arm.model_copy(update={"choose": None})
        if arm.choose != "best":
            matched = study.points[str(arm.choose)].arm
            wanted[matched] = study.arms[matched]
            if isinstance(study.arms[matched], Proxy):
                wanted[study.expert_of(matched)] = study.arms[study.expert_of(matched)]
    return Study.model_validate(study.model_dump(exclude={"arms", "measures", "direct", "contrasts"}) | {"arms": wanted, "measures": ("task",)})
