"""Selects settings by their scores on validation items: held out of tuning in each run, or of families that are in no table. Test items are not used.

The trials are a study of their own (`trial_study`): every candidate is a row there. `choose` takes the rows' scores and says which candidate each arm
with `select` takes, and which direct arm is the row `direct`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from pydantic import ValidationError

from evals.data import StudyData
from evals.kinds import ArmSetting, ArmSpec, Direct, Proxy, Selecting, Swept
from evals.measures.registry import measures
from evals.study import DIRECT, Study, explain_invalid
from finetune.items import hold_out
from finetune.recipe import BiasTuning, Tuning
from probes.world.recipes import recipe_of
from proxytune.content import content_key
from proxytune.errors import UserError


@dataclass(frozen=True)
class Choice:
    """What was selected for one arm: `label`, a row of the trial study with its `setting` (for the row `direct`: a row of the study itself).

    `scores` are the candidates' validation scores (and that of the row to match), `trials` the costs of the trial tunings.
    """

    arm: str
    label: str
    setting: ArmSetting
    tuning: Tuning | BiasTuning | None
    scores: Mapping[str, float]
    trials: Sequence[Mapping[str, Any]] = ()

    def __str__(self) -> str:
        scores = ", ".join(f"{label} {score:.3f}" for label, score in self.scores.items())
        return f"{self.arm}: selected {self.label} by validation ({scores})"


class Choices(dict[str, Choice]):
    """The choice of every arm that selects in one run, and of the row `direct` if there is one."""


def trial_study(study: Study) -> Study:
    """The study of the trials: the candidates as arms, with the arms that they are to match, measured at the task only."""
    wanted = {study.base_arm, *study.selecting}
    wanted |= {study.rows[label].arm for arm in study.arms.values() if isinstance(arm, Selecting) and (label := arm.matched) is not None}
    if study.selects_direct:
        wanted |= {name for name, arm in study.arms.items() if isinstance(arm, Direct) and arm.tuning is not None}
    wanted |= {study.expert_of(name) for name in wanted if isinstance(study.arms[name], Proxy)}
    arms: dict[str, ArmSpec] = {
        name: arm.model_copy(update={"select": None}) if isinstance(arm, Selecting) else arm for name, arm in study.arms.items() if name in wanted
    }
    left_out = {"arms", "measures", "settings", "direct", "contrasts", "selected"}
    return Study.model_validate(study.model_dump(exclude=left_out) | {"arms": arms, "measures": (gain_of(study),)})


def gain_of(study: Study) -> str:
    """The measure that says how good an arm is at what it is tuned for: the study's first one, or the first of all."""
    gains = [name for name, measure in measures().items() if measure.role == "gain"]
    return next((name for name in study.measures if name in gains), gains[0])


def trial_data(study: Study, data: StudyData, seed: int) -> StudyData:
    """The data of the trials: the training items without the validation items, and these as test. Raises `UserError` if there are too few items."""
    fit, held_out = hold_out(data.train, study.validation_share, seed)
    return replace(data, train=fit, test=held_out, knowledge=())


def score_of(items: pd.DataFrame) -> float:
    """The share of right answers, with the same weight for each unit."""
    return float(items.groupby("unit")["right"].mean().mean())


def choose(study: Study, scores: Mapping[str, float], costs: Mapping[str, Mapping[str, Any]] | None = None) -> Choices:
    """Selects by the scores of the trial study's rows: for each arm with `select` the best candidate, or the one nearest to the row to match.

    An expert is selected by what it is for: the best score of a proxy over it whose own setting is selected as the best; without such a proxy by its
    own score. A proxy over an expert with `select` has that expert's selected setting. The row `direct` is the direct arm with the best score, those
    with `select` at their selected setting. In a tie the first candidate wins. `costs` are those of the trial study's rows; a choice counts each
    tuning of its candidates once.
    """
    trials = trial_study(study)
    found = Choices()

    def row_of(label: str) -> str:
        """The trial study's row that stands for a row of the study."""
        setting = study.rows[label]
        if setting.arm in study.selecting:
            return chosen(setting.arm).label
        candidates = _candidates(setting.arm, setting.value)
        return label if label in candidates else next(iter(candidates))

    def _candidates(name: str, alpha: float | None = None) -> dict[str, ArmSetting]:
        """The rows of an arm in the trial study; of a proxy only those with this alpha, over the expert that is selected if one is."""
        rows = trials.rows_of(name)
        if not isinstance(study.arms[name], Proxy):
            return rows
        expert = study.expert_of(name)
        only = chosen(expert).label if expert in study.selecting else None
        return {label: one for label, one in rows.items() if only in (None, one.expert) and alpha in (None, one.value)}

    def score(candidate: str) -> float:
        best = [name for name in study.selecting if isinstance(arm := study.arms[name], Proxy) and arm.select == "best"]
        return max(
            (scores[label] for name in best for label, row in trials.rows_of(name).items() if row.expert == candidate), default=scores[candidate]
        )

    def chosen(name: str) -> Choice:
        if name not in found:
            arm, candidates = study.arms[name], _candidates(name)
            matched = arm.matched if isinstance(arm, Selecting) else None
            used = {candidate: scores[candidate] if matched else score(candidate) for candidate in candidates}
            aim = 1.0 if matched is None else scores[row_of(matched)]
            label = min(candidates, key=lambda candidate: abs(used[candidate] - aim))
            shown = used | ({} if matched is None else {matched: aim})
            tuned = study.expert_of(name) if isinstance(arm, Proxy) else name
            found[name] = Choice(name, label, candidates[label], _tuning(study, name, label), shown, _costs(trials, [tuned], costs))
        return found[name]

    for name in study.selecting:
        chosen(name)
    if study.selects_direct:
        names = [name for name, arm in study.arms.items() if isinstance(arm, Direct) and arm.tuning is not None]
        rows = {label: setting for name in names for label, setting in study.rows_of(name).items()}
        shown = {label: scores[row_of(label)] for label in rows}
        best = max(shown, key=shown.__getitem__)
        found[DIRECT] = Choice(DIRECT, best, rows[best], None, shown, _costs(trials, names, costs))
    return found


def _tuning(study: Study, name: str, label: str) -> Tuning | BiasTuning | None:
    arm = study.arms[name]
    return arm.settings(name)[label][1].tuning if isinstance(arm, Swept) else None


def _costs(trials: Study, names: Sequence[str], costs: Mapping[str, Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """The costs of the arms' trial tunings, of equal ones once."""
    if costs is None:
        return []
    tunings: dict[object, str] = {}
    for name in names:
        arm = trials.arms[name]
        for label, (_, setting) in arm.settings(name).items() if isinstance(arm, Swept) else ():
            tunings.setdefault(setting.tuning or label, label)
    return [costs[label] for label in tunings.values()]


def recorded(study: Study) -> Choices | None:
    """The choices that stand in the study file; None if settings are selected while the study runs, or not at all."""
    return None if study.selected is None else choose(study, study.selected.scores)


def selects_here(study: Study) -> bool:
    """Whether settings are selected while the study runs."""
    return study.selected is None and bool(study.selecting or study.selects_direct)


def trials_of(study: Study, label: str, choices: Choices) -> Sequence[Mapping[str, Any]]:
    """The costs of the trials that count among a row's costs: those of its arm, or of its expert."""
    name = study.arm_settings[label].arm
    expert = study.expert_of(name) if study.arm_settings[label].kind == "proxy" else ""
    return next((choices[each].trials for each in (name, expert) if each in choices), ())


def strength(study: Study, label: str, choices: Choices) -> tuple[str, float]:
    """The row of a proxy's expert and its alpha."""
    setting = study.rows[label]
    if setting.arm not in study.selecting:
        assert setting.value is not None
        return setting.expert, setting.value
    selected, expert = choices[setting.arm].setting, study.expert_of(setting.arm)
    assert selected.value is not None
    return expert if expert in study.selecting else selected.expert, selected.value


def check_selection(study: Study) -> None:
    """Raises `UserError` if two candidates have one name, or if what was selected beforehand does not fit the study."""
    if not study.selecting and not study.selects_direct:
        return
    try:
        trials = trial_study(study)
    except ValidationError as error:
        raise UserError(f"study: of the settings to select from, {explain_invalid(error).removeprefix('study: ')}") from error
    selected = study.selected
    if selected is None:
        return
    again = f"run again: proxytune select STUDY {' '.join(f'--seed {seed}' for seed in selected.seeds)}"
    names = {*study.selecting, *([DIRECT] if study.selects_direct else [])}
    if odd := sorted(names ^ {*selected.chosen}):
        raise UserError(f"selected.chosen: {odd[0]!r} is {'missing' if odd[0] in names else 'no arm with select'}; {again}")
    if odd := sorted({*trials.rows} ^ {*selected.scores}):
        raise UserError(f"selected.scores: {odd[0]!r} is {'missing' if odd[0] in trials.rows else 'no candidate'}; {again}")
    if selected.worlds != study.worlds or selected.key != selection_key(study):
        raise UserError(f"selected: the candidates or the worlds have changed since they were scored; {again}")
    for name, choice in choose(study, selected.scores).items():
        if selected.chosen[name] != choice.label:
            raise UserError(f"selected.chosen.{name}: by its scores it is {choice.label!r}, not {selected.chosen[name]!r}; {again}")


def selection_key(study: Study) -> str:
    """A hash of the candidates and of the worlds' recipes: of everything but the seeds that decides what is selected beforehand."""
    arms = {name: arm.model_dump(exclude_defaults=True) for name, arm in trial_study(study).arms.items()}
    return content_key(arms=arms, worlds=[recipe_of(world).key for world in study.worlds])[:16]
