"""No number of a shipped study of worlds depends on a setting that was chosen by test items."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from helpers import run_in_process

from evals.commands.select import family_study, selected_block
from evals.kinds import SweptName, Tuned
from evals.selection import Choices, recorded
from evals.study import STUDIES, Study, load_study
from finetune.recipe import Tuning


def chosen_by_nothing(study: Study) -> list[str]:
    """The tuned arms whose settings are neither selected, nor shown at all their values, nor those of such an arm by design.

    By design: the tuning is that of a selected or shown setting with at most one difference, which is none of the settings that are swept (a control:
    shuffled answers, frozen layers, other items). What is selected in every run has no fixed setting that another arm could have by design.
    """
    tuned = {name: arm for name, arm in study.arms.items() if isinstance(arm, Tuned) and arm.tuning is not None}
    shown = list(_shown(study))
    return [name for name, arm in tuned.items() if arm.sweep is None and not any(_is_control(arm.tuning, tuning) for tuning in shown if arm.tuning)]


def _shown(study: Study) -> Iterator[Tuning]:
    beforehand = recorded(study) or Choices()
    for name, arm in study.arms.items():
        if isinstance(arm, Tuned) and arm.sweep is not None:
            if arm.select is None:
                yield from (setting.tuning for _, setting in arm.settings(name).values() if setting.tuning is not None)
            elif name in beforehand and (tuning := beforehand[name].tuning) is not None:
                yield tuning


def _is_control(tuning: Tuning | None, other: Tuning) -> bool:
    assert tuning is not None
    differ = {field for field, value in tuning.model_dump().items() if value != other.model_dump().get(field)}
    return len(differ) <= 1 and not differ & set(get_args(SweptName))


WORLDS = [path for path in sorted(STUDIES.glob("*.yaml")) if load_study(path)[0].worlds]


@pytest.mark.parametrize("path", WORLDS, ids=lambda path: path.stem)
def test_every_setting_of_a_shipped_study_is_selected_on_validation_items_or_shown_with_its_whole_sweep(path: Any) -> None:
    assert chosen_by_nothing(load_study(path)[0]) == []


SELECTED = [path for path in WORLDS if load_study(path)[0].selected is not None]


@pytest.mark.slow  # builds four families, for all studies once, and tunes every candidate on each: about half an hour
def test_what_stands_in_the_shipped_studies_comes_out_again(tmp_path: Path) -> None:
    assert len(SELECTED) >= 3
    for path in SELECTED:
        study, folder = load_study(path)
        assert study.selected is not None
        again, _ = load_study(path, select_again=True)
        done = run_in_process(family_study(again, study.selected.seeds), folder, tmp_path)
        block = yaml.safe_load(selected_block(again, study.selected.seeds, done.records))["selected"]
        assert block["chosen"] == study.selected.chosen
        assert block["scores"] == pytest.approx(study.selected.scores, abs=0.005), "another processor may round otherwise"
        assert block["key"] == study.selected.key


TUNING = {"method": "full", "learning_rate": 3e-4, "epochs": 3}
SWEEP = {"learning_rate": [1e-4, 3e-4]}
STUDY: dict[str, Any] = {
    "study": "made",
    "worlds": ["tiny"],
    "measures": ["task"],
    "direct": "best",
    "arms": {
        "base": {"kind": "base"},
        "expert": {"kind": "expert", "tuning": TUNING, "sweep": SWEEP},
        "proxy": {"kind": "proxy", "alpha": [0.5, 1]},
        "full": {"kind": "direct", "tuning": TUNING},  # the expert's own settings, at one rate of its sweep
        "shuffled": {"kind": "direct", "tuning": TUNING | {"shuffled": True}},
        "lora": {"kind": "direct", "tuning": TUNING | {"method": "lora", "rank": 8}, "sweep": SWEEP, "select": "best"},
    },
}


@pytest.mark.parametrize(
    ("arms", "broken"),
    [
        ({}, []),
        ({"full": {"tuning": TUNING | {"learning_rate": 2e-4}}}, ["full"]),  # a rate that is nobody's
        ({"full": {"tuning": TUNING | {"epochs": 2}}}, ["full"]),
        ({"shuffled": {"tuning": TUNING | {"shuffled": True, "batch_size": 8}}}, ["shuffled"]),  # two differences
        ({"lora": {"sweep": None, "select": None}}, ["lora"]),
        ({"expert": {"sweep": None}}, ["expert", "full", "shuffled"]),  # nothing is left that was chosen
        ({"expert": {"select": "best"}}, ["full", "shuffled"]),  # every run has another rate, which theirs need not be
    ],
)
def test_a_setting_that_nothing_chose_is_named(arms: dict[str, Any], broken: list[str]) -> None:
    content = copy.deepcopy(STUDY)
    for name, changes in arms.items():
        content["arms"][name] |= changes
    assert chosen_by_nothing(Study.model_validate(content)) == broken
