"""The records of a study, as measures read them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_float_dtype

from evals.measures.registry import measures
from evals.records import Record
from evals.statistics.estimates import estimate
from evals.study import Run, Study
from proxytune.errors import UserError


class Recorded:
    """A study's frames by name and arm: `recorded(frame, arm)` is a list with one frame per seed and world, the mean over its tunings
    (`tunings(frame, arm)` are these)."""

    def __init__(self, study: Study, records: Sequence[Record]):
        """Raises `UserError` if arms of one table were asked differently."""
        self.study = study
        self._records = records
        self.estimate = partial(estimate, same_units=study.same_items)
        self._tunings: dict[tuple[str, str], dict[Run, list[pd.DataFrame]]] = {}
        self._summaries: dict[str, Any] = {}
        asked: dict[tuple[object, ...], Record] = {}
        for record in records:
            run = Run(record.world, record.seed)
            first = asked.setdefault((record.frame, run), record)
            if first.protocol != record.protocol:
                raise UserError(f"{record.frame}: arms {first.arm} and {record.arm} were asked differently; rows of one table need one protocol")
            self._tunings.setdefault((record.frame, record.arm), {}).setdefault(run, []).append(record.items)
        self._frames = {key: [_mean(tunings) for tunings in runs.values()] for key, runs in self._tunings.items()}

    def __call__(self, frame: str, arm: str) -> list[pd.DataFrame]:
        return self._frames.get((frame, arm), [])

    def tunings(self, frame: str, arm: str) -> list[list[pd.DataFrame]]:
        """For every seed and world, the frames of its tunings."""
        return list(self._tunings.get((frame, arm), {}).values())

    def has(self, frame: str, arm: str) -> bool:
        return (frame, arm) in self._frames

    def arms(self, frame: str) -> list[str]:
        """The arms that have the frame, in the study's order."""
        return [arm for arm in self.study.arm_settings if self.has(frame, arm)]

    def by_world(self) -> "list[tuple[str | None, Recorded]]":
        """The records of each world by themselves, under its name; all under None where the study has data of its own."""
        return [(world, Recorded(self.study, [one for one in self._records if one.world == world])) for world in self.study.worlds or (None,)]

    def distinct(self, frame: str) -> tuple[list[str], list[int]]:
        """The arms that have the frame, of arms with the very same records only the first, and for each arm of `arms` its place among these.

        The row `direct` has the records of the arm that was selected. If that is one arm in every run, both are one series of values.
        """
        same = [tuple(map(id, self(frame, arm))) for arm in self.arms(frame)]
        places = {ids: place for place, ids in enumerate(dict.fromkeys(same))}
        first = dict(zip(reversed(same), reversed(self.arms(frame)), strict=True))
        return [first[ids] for ids in places], [places[ids] for ids in same]

    def by_seed(self, frame: str) -> list[list[pd.DataFrame]]:
        """For every run, the frames of all arms that have the frame."""
        return [list(of_arms) for of_arms in zip(*(self(frame, arm) for arm in self.arms(frame)), strict=True)]

    def summary(self, name: str) -> Any:
        """A measure's summary, computed once. Measures may use each other's summaries."""
        if name not in self._summaries:
            self._summaries[name] = measures()[name].summarize(self, self.study.settings_of(name))
        return self._summaries[name]


def _mean(tunings: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The frame of several tunings on the same items: means of what is measured, and the first tuning's texts."""
    first = tunings[0]
    if len(tunings) == 1:
        return first
    measured = [str(name) for name in first if name != "popularity" and (is_bool_dtype(first[name]) or is_float_dtype(first[name]))]
    return first.assign(**{name: np.mean([frame[name].to_numpy(float) for frame in tunings], axis=0) for name in measured})
