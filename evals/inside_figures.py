"""Pictures of what tuning did inside: density by layer and exposure, restoration, the lens, drift, and how soon knowledge returns.

Drawn is what was measured. A panel is an arm; more than twelve go on to a second file. Intervals and bands are at 95 %: over units of
a single seed; of several over seeds, or over units within them where that is wider. The heat map and the relearning curves come from
the records, all else from the results object.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evals.drawing import drawn_name, save
from evals.findings import METRIC, Found, by_unit, intervals, means_by_unit, states_of
from evals.study import Study
from probes.internals.blocks import BLOCKS, thirds
from probes.knowledge.familiarity import familiarity
from probes.recoverability import CURVES, NEVER

PANELS, ACROSS = 12, 3
NARROWEST = 9.0  # inches: what titles and legends need
FEW_STATES, STATED = 16, 40  # with more states a heat map's rows are closer; with yet more, its numbers would not be legible
AFTER = "residual stream after layer (0: embeddings)"
DRIFT = (
    ("relative_change", "change of the weights (% of their norm)", 100.0),
    ("cka/familiar", "CKA with the base's states, familiar", 1.0),
    ("cosine/familiar", "cosine with the base's states, familiar", 1.0),
)
COLOURS = {"plain": "tab:gray", "base": "tab:blue", "own": "tab:orange"}
LENSES = {"plain": "plain", "base": "base's", "own": "own"}
Row = dict[str, Any]


def draw_inside(study: Study, results: dict[str, Any], found: Found, out: Path) -> list[Path]:
    """Draws what there is and returns where."""
    title = f"{study.study}, {len(study.seeds)} seed(s)"
    drawn = _heat_maps(title, {arm: density_change(found, arm) for arm in _arms(results["erosion"])}, out)
    if results["exposure"]:
        drawn.append(_density_by_layer(title, results, out / "density-by-layer.png"))
    if results["law"] or results["drift"]:
        drawn.append(_drift(title, results, out / "drift.png"))
    drawn += _paged(
        _arms(results["restoration"]), out / "restoration.png", lambda arms, path: _restoration(title, results["restoration"], arms, path)
    )
    seen = [arm for arm in _arms(results["lens"]) if arm != results["base"]]
    drawn += _paged(seen, out / "lens.png", lambda arms, path: _lens(title, results, arms, path))
    curves = {arm: relearning_curves(found, arm) for arm in found.arms("recoverability")}
    drawn += _paged(list(curves), out / "recoverability.png", lambda arms, path: _recoverability(title, {arm: curves[arm] for arm in arms}, path))
    return drawn


class Change(NamedTuple):
    """Tuned less base in effective rank, by state (0: embeddings) and exposure; `certain` where the 95 % interval excludes zero."""

    buckets: list[str]
    value: Float[np.ndarray, "states buckets"]
    certain: Bool[np.ndarray, "states buckets"]


def density_change(found: Found, arm: str) -> Change:
    """Of the residual stream at the last token: means over a bucket's items, then over seeds."""
    buckets: list[str] = []
    seeds = []
    for base, tuned in zip(found("states", found.study.base_arm), found("states", arm), strict=True):
        columns = [f"{METRIC}/residual/last/{state}" for state in range(states_of(base))]
        change = tuned[columns].to_numpy(float) - base[columns].to_numpy(float)
        sorted_in = familiarity(base["popularity"].tolist())
        buckets = list(sorted_in.labels)
        inside = np.array([[bucket == label for label in buckets] for bucket in sorted_in.buckets])
        of_buckets = np.where(inside[:, None, :], change[:, :, None], np.nan)
        seeds.append(by_unit(base, of_buckets.reshape(len(base), -1)))
    values = intervals(found.estimate(seeds))
    shape = (-1, len(buckets))
    return Change(buckets, np.array([value.value for value in values]).reshape(shape), np.array([v.excludes_zero() for v in values]).reshape(shape))


class Relearning(NamedTuple):
    """The right candidate's probability after each step, with its interval's ends, and what the base knows of the same items."""

    steps: list[int]
    value: Float[np.ndarray, " steps"]
    low: Float[np.ndarray, " steps"]
    high: Float[np.ndarray, " steps"]
    base: float


def relearning_curves(found: Found, arm: str) -> dict[str, Relearning]:
    """The curves that every seed of the arm has."""
    frames = found("recoverability", arm)
    curves = {}
    for name in CURVES:
        parts = [frame[frame["curve"] == name] for frame in frames]
        if any(part.empty for part in parts):
            continue
        tables = [part.pivot(index=["unit", "item", "popularity"], columns="step", values="probability").astype(float) for part in parts]
        steps = [int(step) for step in tables[0].columns]
        value, low, high = (
            np.array(intervals(found.estimate([means_by_unit(table.reset_index(), table.to_numpy()) for table in tables]))).clip(0, 1).T
        )
        known = float(np.mean([part.drop_duplicates("item")["base_probability"].mean() for part in parts]))
        curves[name] = Relearning(steps, value, low, high, known)
    return curves


def _arms(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _paged(arms: Sequence[str], path: Path, drawing: Callable[[Sequence[str], Path], Path]) -> list[Path]:
    """So many arms a file as have room; the second is called NAME-2."""
    pages = [arms[start : start + PANELS] for start in range(0, len(arms), PANELS)]
    return [drawing(page, path if number == 1 else path.with_stem(f"{path.stem}-{number}")) for number, page in enumerate(pages, start=1)]


def _panels(arms: Sequence[str], width: float, height: float, below: str, beside: str) -> tuple[Figure, Iterator[tuple[str, Axes]]]:
    """A figure with a titled panel for every arm, several a row; scales and what they are (`below` and `beside`) are shared."""
    across = min(len(arms), ACROSS)
    down = -(-len(arms) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(max(NARROWEST, width * across), height * down + 1.2), layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    places = list(grid.flat)
    for axes in places[len(arms) :]:
        axes.remove()
    for place, axes in enumerate(places[: len(arms)]):
        axes.set_title(drawn_name(arms[place]), fontsize="medium")
        lowest = place + across >= len(arms)
        axes.tick_params(labelbottom=lowest)
        axes.set_xlabel(below if lowest else "")
        axes.set_ylabel(beside if place % across == 0 else "")
    return figure, zip(arms, places, strict=False)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize="small")


def _heat_maps(title: str, changes: dict[str, Change], out: Path) -> list[Path]:
    """One scale of colours for all arms, centred on no change."""
    most = max((float(np.abs(change.value[np.isfinite(change.value)]).max(initial=0)) for change in changes.values()), default=0) or 1.0
    return _paged(list(changes), out / "density-change.png", lambda arms, path: _heat_map(title, {arm: changes[arm] for arm in arms}, most, path))


def _heat_map(title: str, changes: dict[str, Change], most: float, path: Path) -> Path:
    first = next(iter(changes.values()))
    states, buckets = first.value.shape
    height = max(2.2, (0.42 if states <= FEW_STATES else 0.25) * min(states, STATED))
    figure, panels = _panels(list(changes), max(3.6, 0.75 * buckets), height, _exposure(first.buckets), "after layer (0: embeddings)")
    for arm, axes in panels:
        change = changes[arm]
        image = axes.imshow(1000 * change.value, cmap="RdBu_r", vmin=-1000 * most, vmax=1000 * most, origin="lower", aspect="auto")
        for state, bucket in np.ndindex(states, buckets) if states <= STATED else ():
            value = change.value[state, bucket]
            style: dict[str, Any] = {
                "weight": "bold" if change.certain[state, bucket] else "normal",
                "color": "white" if abs(value) > 0.6 * most else "black",
            }
            axes.text(bucket, state, f"{1000 * value:.1f}" if np.isfinite(value) else "n/a", ha="center", va="center", fontsize=8, **style)
        axes.set_xticks(range(buckets), [label.split("=")[1] for label in first.buckets])
        axes.set_yticks(range(0, states, 1 if states <= FEW_STATES else 4))
        for block in thirds(states - 1).values():
            if len(block):
                axes.axhline(block[0] - 0.5, color="black", linewidth=0.6)
    figure.colorbar(image, ax=figure.axes, label="effective rank, thousandths", shrink=0.8, aspect=25 * -(-len(changes) // ACROSS))
    colours = "red is denser, blue is sparser; bold: the 95 % interval excludes zero, as one in twenty does by chance"
    lines = "lines part embeddings, low, middle and high"
    figure.suptitle(f"{title}: change of density (arm less base), residual stream at the last token\n{colours}\n{lines}")
    return save(figure, path)


def _exposure(labels: Sequence[str]) -> str:
    return "times the pretraining corpus stated the fact" if labels[0].startswith("k=") else "popularity"


def _density_by_layer(title: str, results: dict[str, Any], path: Path) -> Path:
    """Whether density tells familiar from unfamiliar before any tuning, and whether the architecture alone would."""
    names = {"untrained": "untrained", results["base"]: "base"}
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharex=True)
    for axes, (metric, words) in zip(
        panels, (("effective_rank", "effective rank (higher is denser)"), ("e5", "E5 (higher is sparser)")), strict=True
    ):
        for arm, name in names.items():
            wanted = {"arm": arm, "metric": metric, "site": "residual", "place": "last"}
            rows = [row for row in results["exposure"] if all(row[key] == value for key, value in wanted.items())]
            _band(axes, [row["state"] for row in rows], [row["contrast"] for row in rows], 1000, label=name)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(words, fontsize="medium")
        axes.set_xlabel(AFTER)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("familiar less unfamiliar (thousandths)")
    _legend(figure, panels[0], 2)
    figure.suptitle(f"{title}: density at the last token, with 95 % intervals")
    return save(figure, path)


def _band(axes: Axes, places: Sequence[int], entries: Sequence[Row], scale: int | float, **style: Any) -> None:
    """A line with its band, where there are numbers."""
    known = [(place, entry) for place, entry in zip(places, entries, strict=True) if entry["value"] is not None]
    if not known:
        return
    x = [place for place, _ in known]
    value, low, high = (np.array([np.nan if entry[name] is None else scale * entry[name] for _, entry in known]) for name in ("value", "low", "high"))
    (line,) = axes.plot(x, value, marker="o", markersize=4, linewidth=1.2, **style)
    axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)


def _errors(entries: Sequence[Row], scale: int | float) -> np.ndarray:
    """How far the ends of intervals are from their values, [2, entries]; zero where there is no interval."""
    ends = [(entry["value"] - entry["low"], entry["high"] - entry["value"]) if entry["low"] is not None else (0.0, 0.0) for entry in entries]
    return scale * np.array(ends).clip(min=0).reshape(-1, 2).T


def _restoration(title: str, rows: Sequence[Row], arms: Sequence[str], path: Path) -> Path:
    """A block's Shapley value, what it brings back alone, and what its controls bring back."""
    shown = {
        "shapley": "Shapley value",
        "recovery": "restored alone",
        "same-number": "as many parameters elsewhere",
        "same-norm": "as much change elsewhere",
    }
    colours = ["tab:blue", "tab:cyan", "tab:gray", "lightgray"]
    found = {(row["arm"], row["what"], row["part"]): row for row in rows if row["value"] is not None}
    figure, panels = _panels(arms, 4.8, 3.0, "", "brought back (points of probability)")
    for arm, axes in panels:
        for number, (what, words) in enumerate(shown.items()):
            places = [place for place, block in enumerate(BLOCKS) if (arm, what, block) in found]
            entries = [found[arm, what, BLOCKS[place]] for place in places]
            x = np.array(places, float) + (number - 1.5) * 0.2
            heights = [100 * entry["value"] for entry in entries]
            axes.bar(x, heights, 0.2, yerr=_errors(entries, 100), color=colours[number], label=words, error_kw={"elinewidth": 0.8}, capsize=1.5)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(BLOCKS)), BLOCKS, fontsize="small")
        lost = found.get((arm, "loss", "all"))
        if lost is not None:
            axes.set_title(f"{drawn_name(arm)}: {100 * lost['value']:.1f} points lost", fontsize="medium")
    figure.suptitle(f"{title}: what restoring a block to the base brings back\nwith 95 % intervals; controls stand beside what is restored alone")
    _legend(figure, figure.axes[0], 4)
    return save(figure, path)


def _lens(title: str, results: dict[str, Any], arms: Sequence[str], path: Path) -> Path:
    """Dashed is the base, through the same lens."""
    rows = [row for row in results["lens"] if row["what"] == "share"]
    figure, panels = _panels(arms, 4.2, 3.2, AFTER, "right candidate's share (%)")
    for arm, axes in panels:
        for of, style in ((arm, "-"), (results["base"], "--")):
            for lens, colour in COLOURS.items():
                chosen = sorted((row for row in rows if row["arm"] == of and row["lens"] == lens), key=lambda row: row["state"])
                label = f"{'arm' if of == arm else 'base'}, {LENSES[lens]} lens"
                _band(axes, [row["state"] for row in chosen], chosen, 100, color=colour, linestyle=style, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{title}: what the layers already say of the right answer, with 95 % bands")
    _legend(figure, figure.axes[0], 5)
    return save(figure, path)


def _drift(title: str, results: dict[str, Any], path: Path) -> Path:
    """By block for models with weights of their own; what comes out for all arms."""
    rows = results["drift"]
    arms = _arms(rows)
    colours = plt.get_cmap("tab10" if len(arms) <= 10 else "tab20")
    parts = DRIFT if rows else ()
    count = len(parts) + bool(results["law"])
    across, down = min(2, count), -(-count // 2)
    height = max(4.2, 0.35 * len(_arms(results["law"])))
    figure, grid = plt.subplots(down, across, figsize=(max(NARROWEST, 6.0 * across), height * down), layout="constrained", squeeze=False)
    places = list(grid.flat)
    for axes, (what, words, scale) in zip(places, parts, strict=False):
        for position, arm in enumerate(arms):
            entries = {row["block"]: row for row in rows if row["arm"] == arm and row["what"] == what and row["value"] is not None}
            x = np.array([BLOCKS.index(block) for block in entries]) + (position - (len(arms) - 1) / 2) * 0.3 / len(arms)
            values = [scale * entry["value"] for entry in entries.values()]
            style: dict[str, Any] = {"color": colours(position % colours.N), "marker": "o", "markersize": 4, "capsize": 2, "linewidth": 1}
            axes.errorbar(x, values, yerr=_errors(list(entries.values()), scale), label=drawn_name(arm), **style)
        shown = [block for block in BLOCKS if any(row["block"] == block and row["what"] == what for row in rows)]
        axes.set_xticks([BLOCKS.index(block) for block in shown], shown)
        axes.set_title(words, fontsize="medium")
    if rows:
        _legend(figure, places[0], min(len(arms), 6))
    if results["law"]:
        _law(places[len(parts)], results["law"])
    for axes in places[count:]:
        axes.remove()
    figure.suptitle(f"{title}: drift from the base, with 95 % intervals where there are any")
    return save(figure, path)


def _law(axes: Axes, rows: Sequence[Row]) -> None:
    arms = _arms(rows)
    for number, group in enumerate(("familiar", "unfamiliar")):
        entries = [row for row in rows if row["group"] == group and row["value"] is not None]
        y = np.array([arms.index(row["arm"]) for row in entries]) + (number - 0.5) * 0.35
        axes.barh(y, [row["value"] for row in entries], 0.35, xerr=_errors(entries, 1), label=group, error_kw={"elinewidth": 0.8}, capsize=1.5)
    axes.set_yticks(range(len(arms)), list(map(drawn_name, arms)))
    axes.invert_yaxis()
    axes.set_title("KL(base || arm) after the statement (nats)", fontsize="medium")
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=2, frameon=False)


def _recoverability(title: str, curves: dict[str, dict[str, Relearning]], path: Path) -> Path:
    """Dotted is what the base knows of the curve's items."""
    words = {
        "forgotten": "exposed facts, taught again",
        "never exposed": "facts never exposed, taught",
        "unrelated": "exposed facts, ten others taught",
    }
    figure, panels = _panels(list(curves), 4.2, 3.2, "steps of tuning on plain statements (log scale)", "right candidate's probability (%)")
    for arm, axes in panels:
        for number, (name, curve) in enumerate(curves[arm].items()):
            x = np.log2(np.array(curve.steps) + 1)
            (line,) = axes.plot(x, 100 * curve.value, marker="o", markersize=3, linewidth=1.2, color=f"C{number}", label=words[name])
            axes.fill_between(x, 100 * curve.low, 100 * curve.high, alpha=0.15, color=line.get_color(), linewidth=0)
            if name != NEVER:
                axes.axhline(100 * curve.base, color=line.get_color(), linestyle=":", linewidth=1)
            axes.set_xticks(x, [str(step) for step in curve.steps])
        axes.set_ylim(0, 100)
    figure.suptitle(f"{title}: how soon knowledge returns, with 95 % bands\ndotted: what the base knows of the same facts")
    _legend(figure, figure.axes[0], 3)
    return save(figure, path)
