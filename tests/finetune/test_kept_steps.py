"""Models that a tuning keeps on its way: the model of that step, whether or not the run was stopped, and the result is as without them."""

from pathlib import Path
from typing import Any

import pytest
from helpers import TUNINGS, Stop, fingerprint, run_tuning, unbroken_tuning
from transformers import TrainerCallback

from proxytune.errors import UserError
from proxytune.member import load_member


class Look(TrainerCallback):
    """The first weight after each step."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen[state.global_step] = float(next(model.parameters()).detach().double().sum())


def test_a_kept_step_is_the_model_of_that_step_and_the_result_stays_the_same(folder: Path) -> None:
    look = Look()
    run_tuning(folder, "kept", look, every=1e9, keep=(3, 7))
    for step in (3, 7):
        weights = next(load_member(folder / "kept" / "steps" / f"step-{step}").model.parameters())
        assert float(weights.detach().double().sum()) == look.seen[step]
    assert look.seen[3] != look.seen[7]
    assert sorted(path.name for path in (folder / "kept" / "steps").iterdir()) == ["step-3", "step-7"]
    assert fingerprint(folder, "kept") == unbroken_tuning()[1]


def test_a_run_that_was_stopped_keeps_the_same_steps(folder: Path) -> None:
    run_tuning(folder, "whole", every=1e9, keep=(3, 7))
    with pytest.raises(KeyboardInterrupt):
        run_tuning(folder, "stopped", Stop(5), keep=(3, 7))
    run_tuning(folder, "stopped", keep=(3, 7))
    for step in ("step-3", "step-7"):
        whole, stopped = (load_member(folder / name / "steps" / step).fingerprint for name in ("whole", "stopped"))
        assert whole == stopped


def test_of_an_adapter_the_adapter_is_kept(folder: Path) -> None:
    run_tuning(folder, "adapter", every=1e9, keep=(3,), **TUNINGS["lora"])
    kept = load_member(folder / "small", folder / "adapter" / "steps" / "step-3").fingerprint
    assert kept not in (load_member(folder / "small").fingerprint, fingerprint(folder, "adapter"))


def test_a_step_after_the_last_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="keep: there is no step 11, tuning ended after 10; name a step before the last"):
        run_tuning(folder, "late", every=1e9, keep=(11,))
