"""The controls of an arm: arms of the same study that differ from it in one setting."""

from evals.kinds import Direct
from evals.selection import Choices, recorded
from evals.study import Study
from finetune.recipe import Tuning


def is_control(study: Study, label: str) -> bool:
    _, tuning = _tuning(study, label)
    return tuning is not None and (tuning.shuffled or tuning.frozen is not None)


def shuffled_twin(study: Study, label: str) -> str | None:
    """The arm with the same tuning on shuffled answers."""
    _, tuning = _tuning(study, label)
    wanted = None if tuning is None else tuning.model_copy(update={"shuffled": True})
    return next((other for other in study.direct_settings if wanted is not None and _tuning(study, other)[1] == wanted), None)


def frozen_twin(study: Study, label: str) -> str | None:
    """The arm with the lower half frozen whose setting was selected to match this one's task score."""
    for other in study.direct_settings:
        arm, tuning = _tuning(study, other)
        if arm.matched == label and tuning is not None and tuning.frozen == "lower":
            return other
    return None


def _tuning(study: Study, label: str) -> tuple[Direct, Tuning | None]:
    """An arm and its tuning: the one that was selected beforehand, or its first candidate if it is selected in every run."""
    point = study.rows[label]
    arm = study.arms[point.arm]
    assert isinstance(arm, Direct)
    choices = recorded(study) or Choices()
    chosen = choices[point.arm].tuning if point.arm in choices else None
    if isinstance(chosen, Tuning):
        return arm, chosen
    return arm, arm.tuning if arm.select is not None else arm.settings(point.arm)[label][1].tuning
