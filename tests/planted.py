"""Studies whose records are drawn with planted effects and planted variances between families, tunings and persons."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from evals.records import Record
from evals.study import Study

ARMS: dict[str, Any] = {
    "base": {"kind": "base"},
    "expert": {"kind": "expert", "tuning": {"method": "full", "learning_rate": 1e-3}},
    "proxy": {"kind": "proxy", "alpha": [1]},
    "full": {"kind": "direct", "tuning": {"method": "full", "learning_rate": 1e-3}},
}
EFFECTS = {"base": 0.2, "expert": 0.3, "proxy@1": 0.6, "full": 0.65}
OWN = {"models": {"base": "base", "small": "small"}, "data": {"train": "train.jsonl", "test": "test.jsonl", "knowledge": "knowledge.jsonl"}}


def study_of(families: int, **changes: Any) -> Study:
    source = {} if "data" in changes else {"worlds": ["tiny"]}
    return Study.model_validate({"study": "planted", "seeds": list(range(families)), "arms": ARMS, "measures": ["task"]} | source | changes)


def records_of(
    study: Study,
    people: int = 20,
    effects: Mapping[str, float] = EFFECTS,
    between: float = 0.0,
    tuned: float = 0.0,
    persons: float = 0.0,
    answers: float = 0.0,
    seed: int = 0,
) -> list[Record]:
    """Shares right of one item a person. An arm's value differs between families by an SD of `between`, between tunings of one family by `tuned`,
    between persons by `persons`, and is drawn anew for every tuning of a person with an SD of `answers`. The base is not tuned. Persons are
    those of the family; with data of the user's own, those of the study."""
    generator = np.random.default_rng(seed)
    names = [str(place) for place in range(people)]
    found = []
    for frame in study.measures:
        own = {arm: generator.normal(0, persons, people) for arm in effects}
        families: dict[Any, dict[str, Any]] = {}
        for run in study.runs:
            first = (run.world, run.seed)
            if first not in families:
                families[first] = {
                    arm: value + generator.normal(0, between) + (own[arm] if study.same_items else generator.normal(0, persons, people))
                    for arm, value in effects.items()
                }
            for arm, values in families[first].items():
                off = 0.0 if arm == "base" else generator.normal(0, tuned) + generator.normal(0, answers, people)
                columns = {"unit": names, "question": names, "popularity": 1.0, "answer": "a", "text": "a", "unparsed": False}
                items = pd.DataFrame(columns | {"right": values + off})
                found.append(Record(arm, frame, run.world, run.seed, frame, items, run.tuning))
    return found
