"""What a figure shows, as a frozen description without a plotting library: `drawing` makes a picture of it.

A chart is panels; a panel is marks on two axes. Numbers are in the unit that the axis names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evals.statistics.value import Value


@dataclass(frozen=True)
class Axis:
    """`ticks` are places with their labels; `integers` allows whole numbers only; `limits` cut the axis."""

    label: str = ""
    ticks: tuple[tuple[float, str], ...] = ()
    integers: bool = False
    limits: tuple[float, float] | None = None
    down: bool = False


@dataclass(frozen=True)
class Series:
    """Values `y` at `x`, as `point` (with intervals), `line` (points joined, with intervals), `bar` or `band` (a line in its band).

    `across` are values of x with intervals of their own; they take the place of `x`. Series of one `label` have one colour and one line
    in the legend; an empty label has none. `group` takes the label's place in the choice of the colour. `filled` says which points are filled.
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


@dataclass(frozen=True)
class Cells:
    """A table of colours: `values` by row and column, of which red is above zero and blue below, each with its number."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[Value, ...], ...]
    lines: tuple[int, ...] = ()


@dataclass(frozen=True)
class Panel:
    """One set of axes: of one arm, or of one facet of the data (`title`)."""

    marks: tuple[Series | Cells, ...]
    title: str = ""
    x: Axis = Axis()
    y: Axis = Axis()
    zero: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure: `name` is its file without the ending, `title` and `note` stand above it.

    `paired` says that the intervals are of paired differences. Panels share their axes where `shared`. `unit` names what cells are of.
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
    """In another unit: per cent in the place of shares, say."""
    value_, low, high = (None if number is None else number * factor for number in (value.value, value.low, value.high))
    return replace(value, value=value_, low=low, high=high)


def all_scaled(values: Sequence[Value], factor: int | float) -> tuple[Value, ...]:
    return tuple(scaled(value, factor) for value in values)


def exposure_axis(labels: Sequence[str]) -> Axis:
    """The axis of the buckets of exposure (`k=30`) or popularity."""
    label = "times the pretraining corpus stated the fact" if labels[0].startswith("k=") else "popularity"
    return Axis(label, tuple((float(place), name.split("=")[1]) for place, name in enumerate(labels)))
