"""Draws charts as PNG files: without a screen, and the same bytes for the same numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from adjustText import adjust_text  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.display.chart import Axis, Cells, Chart, Panel, Series
from evals.statistics.value import Value
from proxytune.files import check_writable
from proxytune.printable import printable

matplotlib.rcParams["text.parse_math"] = False  # a dollar sign in a name does not start a formula
PANELS = 12  # in one file
NARROWEST = 9.0  # inches, which titles and legends need
FEW_ROWS, STATED = 16, 40  # with more rows than the first, cells are lower; with more than the second, they have no numbers
MARKERS = "osD^vP*X<>"
# As on the page; the colour-blind can tell the first ones apart.
PALETTE = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #882255 #44aa99 #999933 #7f7f7f #b15928 #6a3d9a".split()
ROUNDS = 100  # of moving labels apart


def draw(chart: Chart, folder: Path, arms: Sequence[str] = ()) -> list[Path]:
    """Draws a chart into `folder` and returns its files; more than twelve panels continue in a second file, NAME-2.png. Each of the study's `arms`
    has the same colour in all charts."""
    pages = [chart.panels[start : start + PANELS] for start in range(0, len(chart.panels), PANELS)]
    most = max(
        (abs(number) for panel in chart.panels for cells in panel.marks if isinstance(cells, Cells) for number in _numbers(cells)), default=0.0
    )
    return [
        _page(chart, page, most or 1.0, _colours(chart, arms), folder / (f"{chart.name}.png" if number == 1 else f"{chart.name}-{number}.png"))
        for number, page in enumerate(pages, start=1)
    ]


def save(figure: Figure, path: Path) -> Path:
    check_writable(path, "out")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


def drawn_name(name: str) -> str:
    """A name as it can be drawn: matplotlib's legends leave out names that begin with an underscore."""
    return f" {printable(name)}" if name.startswith("_") else printable(name)


def _page(chart: Chart, panels: Sequence[Panel], most: float, colours: dict[str, Any], path: Path) -> Path:
    across = min(len(panels), chart.across)
    down = -(-len(panels) // across)
    width, height = _size(panels, across)
    size = (max(NARROWEST, width * across), height * down + 1.2)
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", sharex=chart.shared, sharey=chart.shared, squeeze=False)
    places = list(grid.flat)
    for axes in places[len(panels) :]:
        axes.remove()
    image = None
    for place, (panel, axes) in enumerate(zip(panels, places, strict=False)):
        image = _panel(panel, axes, colours, most) or image
        if chart.shared:  # ticks and axis labels only at the edge of the figure
            lowest = place + across >= len(panels)
            axes.tick_params(labelbottom=lowest)
            axes.set_xlabel(panel.x.label if lowest else "")
            axes.set_ylabel(panel.y.label if place % across == 0 else "")
    if image is not None:
        figure.colorbar(image, ax=figure.axes, label=chart.unit, shrink=0.8, aspect=25 * down)
    figure.suptitle(printable(f"{chart.title}\n{chart.note}".strip(), keep="\n"))
    found = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if found:
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(len(found), 5), fontsize="small")
    figure.canvas.draw()  # labels are moved apart where the panels are in the end
    for panel, axes in zip(panels, places, strict=False):
        _labels(panel, axes, colours)
    return save(figure, path)


def _size(panels: Sequence[Panel], across: int) -> tuple[float, float]:
    """Width and height of one panel in inches, with room for the numbers of cells and for the names beside bars."""
    cells = [mark for panel in panels for mark in panel.marks if isinstance(mark, Cells)]
    if cells:
        rows, columns = len(cells[0].rows), len(cells[0].columns)
        return max(3.6, 0.75 * columns), max(2.2, (0.42 if rows <= FEW_ROWS else 0.25) * min(rows, STATED))
    width, height = {1: (8.0, 4.2), 2: (6.5, 4.2)}.get(across, (4.5, 3.0))
    named = max(len(panel.y.ticks) for panel in panels)
    return width, max(height, 0.35 * named)


def _colours(chart: Chart, arms: Sequence[str]) -> dict[str, Any]:
    """A colour and a marker for every label or group of the chart: those of the arm of that name, or of the first arm of a family; then the next."""
    series = [mark for panel in chart.panels for mark in panel.marks if isinstance(mark, Series)]
    groups = list(dict.fromkeys(mark.group or mark.label for mark in series if mark.group or mark.label))
    fixed = {arm.partition("@")[0]: place for place, arm in reversed(list(enumerate(arms)))} | {arm: place for place, arm in enumerate(arms)}
    rest = iter(range(len(arms), len(arms) + len(groups)))
    places = {group: fixed[group] if group in fixed else next(rest) for group in groups}
    return {group: (PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]) for group, place in places.items()}


def _panel(panel: Panel, axes: Axes, colours: dict[str, Any], most: float) -> Any:
    """Draws the marks; returns the image of cells, if there is one."""
    image = None
    bars = max(1, sum(isinstance(mark, Series) and mark.mark == "bar" for mark in panel.marks))
    for mark in panel.marks:
        if isinstance(mark, Cells):
            image = _cells(mark, axes, most)
        else:
            colour, marker = colours.get(mark.group or mark.label, ("black", ""))
            _series(mark, axes, colour, marker, 0.8 / bars)
    if panel.zero:
        axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title(drawn_name(panel.title), fontsize="medium")
    for axis, of_axes, set_ticks, set_label, set_limits in (
        (panel.x, axes.xaxis, axes.set_xticks, axes.set_xlabel, axes.set_xlim),
        (panel.y, axes.yaxis, axes.set_yticks, axes.set_ylabel, axes.set_ylim),
    ):
        _axis(axis, of_axes, set_ticks, set_label, set_limits)
    if panel.y.down:
        axes.invert_yaxis()
    return image


def _labels(panel: Panel, axes: Axes, colours: dict[str, Any]) -> None:
    """Names at the points, and the label of each line or band at its last point or, if it has no values of x of its own, where it is
    farthest from zero; of the points that can be seen. They are moved apart."""
    (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    texts, labelled, xs, ys = [], set(), [], []
    for mark in panel.marks:
        if isinstance(mark, Cells) or mark.mark in ("level", "step", "bar"):
            continue
        across = [value.value for value in mark.across] if mark.across else list(mark.x)
        names = mark.names or [""] * len(mark.y)
        seen = [
            (x, value.value, name)
            for x, value, name in zip(across, mark.y, names, strict=True)
            if x is not None and value.value is not None and left <= x <= right and low <= value.value <= high
        ]
        xs += [x for x, _, _ in seen]
        ys += [y for _, y, _ in seen]
        if mark.names:
            shown = [one for one in seen if one[2]]
        elif seen and mark.label and mark.mark != "point" and mark.label not in labelled:
            x, y, _ = seen[-1] if mark.across else max(seen, key=lambda one: abs(one[1]))
            shown = [(x, y, mark.label)]
            labelled.add(mark.label)
        else:
            shown = []
        colour = colours.get(mark.group or mark.label, ("black", ""))[0]
        texts += [axes.text(x, y, drawn_name(name), color=colour, fontsize="x-small") for x, y, name in shown]
    if texts:
        adjust_text(texts, x=xs, y=ys, ax=axes, iter_lim=ROUNDS, arrowprops={"arrowstyle": "-", "color": "gray", "linewidth": 0.5})


def _axis(axis: Axis, of_axes: Any, set_ticks: Any, set_label: Any, set_limits: Any) -> None:
    if axis.ticks:
        set_ticks([place for place, _ in axis.ticks], [drawn_name(label) for _, label in axis.ticks], fontsize="small")
    if axis.integers:
        of_axes.set_major_locator(MaxNLocator(integer=True))
    if axis.limits is not None:
        set_limits(*axis.limits)
    set_label(axis.label)


def _series(mark: Series, axes: Axes, colour: Any, marker: str, thickness: float) -> None:
    if mark.mark == "level":
        axes.axhline(mark.y[0].value or 0.0, color=colour, linestyle=":", linewidth=1)
        return
    places = [value.value for value in mark.across] if mark.across else list(mark.x)
    known = [number for number, (x, value) in enumerate(zip(places, mark.y, strict=True)) if x is not None and value.value is not None]
    if not known:
        return
    x, values = np.array([places[number] for number in known], float), [mark.y[number] for number in known]
    y, low, high = (np.array([np.nan if number is None else number for number in ends], float) for ends in zip(*map(_ends, values), strict=True))
    label = drawn_name(mark.label) if mark.label and mark.mark in ("point", "bar") else None  # others are labelled at their points
    style: dict[str, Any] = {"color": colour, "label": label, "linestyle": "--" if mark.dashed else "-"}
    errors = np.nan_to_num(np.array([y - low, high - y])).clip(min=0)
    if mark.mark == "step":
        axes.step(x, y, where="pre", color="black", linewidth=0.8, linestyle=":", zorder=0)
    elif mark.mark == "band":
        axes.plot(x, y, marker="o", markersize=4, linewidth=1.2, **style)
        axes.fill_between(x, low, high, alpha=0.15, color=colour, linewidth=0)
    elif mark.mark == "bar":
        bar: dict[str, Any] = {"color": colour, "label": label, "error_kw": {"elinewidth": 0.8}, "capsize": 1.5}
        if mark.horizontal:
            axes.barh(x, y, thickness, xerr=errors, **bar)
        else:
            axes.bar(x, y, thickness, yerr=errors, **bar)
    elif mark.across:
        _points(mark, known, axes, x, y, errors, style, marker)
    else:
        line = style if mark.mark == "line" else style | {"linestyle": "none"}
        axes.errorbar(x, y, yerr=errors, marker="o", markersize=4, capsize=2, linewidth=1, **line)


def _points(
    mark: Series, known: Sequence[int], axes: Axes, x: np.ndarray, y: np.ndarray, errors: np.ndarray, style: dict[str, Any], marker: str
) -> None:
    """Points with intervals in both directions, joined if they are a line; `filled` points have the line's colour inside."""
    across = [mark.across[number] for number in known]
    if any(value.low is not None for value in across):
        low, high = (
            np.array([value.value if end is None else end for value, end in zip(across, ends, strict=True)], float)
            for ends in zip(*((value.low, value.high) for value in across), strict=True)
        )
        axes.errorbar(
            x, y, xerr=np.array([x - low, high - x]).clip(min=0), yerr=errors, color=style["color"], alpha=0.3, linestyle="none", elinewidth=0.8
        )
    joined = style if mark.mark == "line" else style | {"linestyle": "none"}
    axes.plot(x, y, marker=marker, markerfacecolor="white", markersize=7, linewidth=1, **joined)
    filled = [place for place, number in enumerate(known) if mark.filled and mark.filled[number]]
    axes.plot(x[filled], y[filled], color=style["color"], marker=marker, markersize=7, linestyle="none")


def _cells(cells: Cells, axes: Axes, most: float) -> Any:
    """Cells with one colour scale for all panels, centred on zero; numbers are bold where the interval excludes zero."""
    values = np.array([[np.nan if value.value is None else value.value for value in row] for row in cells.values], float)
    image = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, origin="lower", aspect="auto")
    for row, column in np.ndindex(*values.shape) if len(cells.rows) <= STATED else ():
        value, number = cells.values[row][column], values[row, column]
        style: dict[str, Any] = {"weight": "bold" if value.excludes_zero() else "normal", "color": "white" if abs(number) > 0.6 * most else "black"}
        axes.text(column, row, f"{number:.1f}" if np.isfinite(number) else "n/a", ha="center", va="center", fontsize=8, **style)
    axes.set_yticks(range(0, len(cells.rows), 1 if len(cells.rows) <= FEW_ROWS else 4))
    for line in cells.lines:
        axes.axhline(line - 0.5, color="black", linewidth=0.6)
    return image


def _numbers(cells: Cells) -> list[float]:
    return [value.value for row in cells.values for value in row if value.value is not None]


def _ends(value: Value) -> tuple[float | None, float | None, float | None]:
    return value.value, value.low, value.high
