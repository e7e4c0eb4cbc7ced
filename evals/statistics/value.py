"""A number with its interval, as summaries hold it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.statistics.intervals import Interval


@dataclass(frozen=True)
class Value:
    """A value with the ends of its 95 % interval, unrounded. None if it could not be measured. `note`, if given, is shown instead of the value."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""

    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


UNKNOWN = Value(None)


def value_of(interval: Interval) -> Value:
    """The value of an interval; numbers that are NaN or infinite become None."""
    return Value(finite(interval.value), finite(interval.low), finite(interval.high))


def values_of(intervals: Iterable[Interval]) -> list[Value]:
    return [value_of(interval) for interval in intervals]


def value_in(row: Mapping[str, Any]) -> Value:
    """The value of a row of results (`value`, `low`, `high`)."""
    return Value(row["value"], row["low"], row["high"])


def finite(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None
