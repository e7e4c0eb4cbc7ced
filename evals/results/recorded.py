"""The records of a study, as measures read them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from evals.measures.registry import measures
from evals.records import Record
from evals.statistics.estimates import estimate
from evals.study import Study
from proxytune.errors import UserError


class Recorded:
    """A study's frames by name and arm: `recorded(frame, arm)` is a list with one frame per run."""

    def __init__(self, study: Study, records: Sequence[Record]):
        """Raises `UserError` if arms of one table were asked differently."""
        self.study = study
        self.estimate = partial(estimate, same_units=study.same_items)
        self._frames: dict[tuple[str, str], list[pd.DataFrame]] = {}
        self._summaries: dict[str, Any] = {}
        asked: dict[tuple[object, ...], Record] = {}
        for record in records:
            first = asked.setdefault((record.frame, record.world, record.seed), record)
            if first.protocol != record.protocol:
                raise UserError(f"{record.frame}: arms {first.arm} and {record.arm} were asked differently; rows of one table need one protocol")
            self._frames.setdefault((record.frame, record.arm), []).append(record.items)

    def __call__(self, frame: str, arm: str) -> list[pd.DataFrame]:
        return self._frames.get((frame, arm), [])

    def has(self, frame: str, arm: str) -> bool:
        return (frame, arm) in self._frames

    def arms(self, frame: str) -> list[str]:
        """The arms that have the frame, in the study's order."""
        return [arm for arm in self.study.arm_settings if self.has(frame, arm)]

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
