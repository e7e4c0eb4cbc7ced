import numpy as np
import pandas as pd
import pytest
from made_summaries import HEADER, RELEARNED, only, shown

from evals.measures.recoverability import Recoverability, RecoverabilityFound, RelearningCurve, _curves
from evals.records import Record
from evals.results.recorded import Recorded
from evals.study import Study

ALL = ("forgotten", "never exposed", "unrelated")


def test_what_was_not_relearned_in_time_has_no_number() -> None:
    table = only(Recoverability().tables(RecoverabilityFound(RELEARNED), HEADER), "Recoverability")
    full, lora = shown(table, "full"), shown(table, "lora")
    assert (full["steps, relearned"], full["steps, learned anew"], full["savings"]) == ("1.8", "n/a", "at least 0.94 [0.94, 0.94]")
    assert (lora["savings"], lora["unrelated facts bring back (% of the loss)"]) == ("n/a", "n/a")
    assert full["unrelated facts bring back (% of the loss)"] == "40.0 [39.8, 40.2]"
    assert full["lost (points of probability)"] == "20.0 [19.8, 20.2]"


def relearned(seed: int, curves: tuple[str, ...] = ALL) -> Record:
    generator = np.random.default_rng([3, seed])
    rows = [
        {
            "unit": f"u{item // 2}",
            "popularity": 3.0,
            "base_right": item % 3 > 0,
            "curve": curve,
            "step": step,
            "item": item,
            "right": False,
            "base_probability": 0.9 * (item % 3 > 0),
            "probability": 0.2 + 0.1 * generator.random() * step,
        }
        for curve in curves
        for step in (0, 1, 2, 4)
        for item in range(12)
    ]
    return Record("full", "recoverability", "tiny", seed, "", pd.DataFrame(rows))


def curves_of(*records: Record) -> dict[str, RelearningCurve]:
    arms = {"base": {"kind": "base"}, "full": {"kind": "direct", "path": "somewhere"}}
    content = {"study": "small", "worlds": ["tiny"], "seeds": [record.seed for record in records], "arms": arms, "measures": ["recoverability"]}
    found = Recorded(Study.model_validate(content), records)
    return {curve.name: curve for curve in _curves(found, found("recoverability", "full"))}


def test_relearning_curves_are_plain_means_and_those_that_a_seed_lacks_are_left_out() -> None:
    records = [relearned(0), relearned(1, curves=("forgotten", "unrelated"))]
    curves = curves_of(*records)
    assert list(curves) == ["forgotten", "unrelated"]
    for name, curve in curves.items():
        assert curve.steps == (0, 1, 2, 4)
        frames = [record.items[record.items["curve"] == name] for record in records]
        for step, value in zip(curve.steps, curve.probability, strict=True):
            assert value.value == pytest.approx(np.mean([frame[frame["step"] == step]["probability"].mean() for frame in frames]))
            assert 0 <= value.low <= value.value <= value.high <= 1
        assert curve.base.value == pytest.approx(0.9 * 8 / 12)
    assert list(curves_of(records[0])) == list(ALL)
