"""Descriptions of figures, frozen and without a plotting library; `drawing` draws them.

A chart has panels; a panel has marks on two axes. Numbers are in the unit that the axis names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evals.statistics.value import Value


@dataclass(frozen=True)
class Axis:
    """`ticks` are positions with their labels; `integers` allows only whole numbers as ticks; `limits` are the axis' ends; `down` inverts it."""

    label: str = ""
    ticks: tuple[tuple[float, str], ...] = ()
    integers: bool = False
    limits: tuple[float, float] | None = None
    down: bool = False


@dataclass(frozen=True)
class Series:
    """Values `y` at `x`: `point` (with intervals), `line` (joined points with intervals), `bar`, `band` (a line with its interval as a band), `step`
    (a dotted step line) or `level` (a horizontal dotted line).

    `across` are values of x with intervals of their own; they are used instead of `x`. Series with the same `label` have one colour; it stands at
    a point of a line or band, and in the legend for other marks. The colour is chosen by `group` if there is one. `filled` says which points
    are filled; `names` are texts at the points, instead of the label.
    """

    mark: Literal["point", "line", "bar", "band", "step", "level"]
    y: tuple[Value, ...]
    x: tuple[float, ...] = ()
    across: tuple[Value, ...] = ()
    label: str = ""
    group: str = ""
    dashed: bool = False
    horizontal: bool = False
    filled: tuple[bool, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cells:
    """A heat map: `values` by row and column, red above zero and blue below, each with its number. `lines` separate rows."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[Value, ...], ...]
    lines: tuple[int, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One set of axes: for one arm, or for one facet of the data (`title`). `zero` draws a line at zero."""

    marks: tuple[Series | Cells, ...]
    title: str = ""
    x: Axis = Axis()
    y: Axis = Axis()
    zero: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure: `name` is its file name without the suffix; `title` and `note` are above it.

    `paired` says that the intervals are those of paired differences. With `shared`, panels share their axes. `unit` is the unit of cells.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    note: str = ""
    unit: str = ""
    paired: bool = False
    shared: bool = False
    across: int = 3


def scaled(value: Value, factor: int | float) -> Value:
    """The value in another unit, such as per cent instead of shares."""
    value_, low, high = (None if number is None else number * factor for number in (value.value, value.low, value.high))
    return replace(value, value=value_, low=low, high=high)


def all_scaled(values: Sequence[Value], factor: int | float) -> tuple[Value, ...]:
    return tuple(scaled(value, factor) for value in values)


def arm_bars(values: Mapping[str, Value], group: str, title: str, label: str) -> Panel:
    """A horizontal bar for each arm, the first one on top."""
    places = tuple(map(float, range(len(values))))
    bars = Series("bar", tuple(values.values()), places, group=group, horizontal=True)
    return Panel((bars,), title, Axis(label), Axis(ticks=tuple(zip(places, values, strict=True)), down=True))


def exposure_axis(labels: Sequence[str]) -> Axis:
    """The axis of the buckets of exposure (`k=30`) or popularity."""
    label = "times the pretraining corpus stated the fact" if labels[0].startswith("k=") else "popularity"
    return Axis(label, tuple((float(place), name.split("=")[1]) for place, name in enumerate(labels)))
