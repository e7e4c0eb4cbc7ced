"""Pictures of a study: task against knowledge, what each arm still knows by exposure, and what tuning did inside (`inside_figures`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from evals.drawing import drawn_name, save
from evals.findings import Found
from evals.inside_figures import draw_inside
from evals.records import Record
from evals.results import SHARE, estimate_means, frames_of, in_bucket
from evals.statistics import interval
from evals.study import Study
from probes.knowledge.familiarity import familiarity

MARKERS = "osD^vP*X<>"


def draw_figures(study: Study, records: Sequence[Record], results: dict[str, Any], out: Path) -> list[Path]:
    """Draws the figures that the study's measures allow and returns where they are."""
    drawn = []
    if results["frontier"]:
        drawn.append(_frontier(study, results, out / "frontier.png"))
    if "forgetting" in study.measures:
        drawn.append(_knowledge(study, records, out / "knowledge-by-exposure.png"))
    return drawn + draw_inside(study, results, Found(study, records), out)


def _frontier(study: Study, results: dict[str, Any], path: Path) -> Path:
    """A line for every arm through the points of its dial, whole and near the frontier's end; a dotted step joins the frontier."""
    entries = results["frontier"]
    best = sorted((100 * entry["gain"]["value"], 100 * entry["kept"]["value"]) for entry in entries if entry["on_frontier"])
    figure, (whole, near) = plt.subplots(1, 2, figsize=(15, 6.5), layout="constrained")
    for axes in (whole, near):
        for place, family in enumerate(dict.fromkeys(entry["family"] for entry in entries)):
            _dial(axes, place, [entry for entry in entries if entry["family"] == family], intervals=axes is near)
        axes.step([x for x, _ in best], [y for _, y in best], where="pre", color="black", linewidth=0.8, linestyle=":", zorder=0)
        axes.set_xlabel("task gain, arm less base (points)")
        axes.axhline(0, color="black", linewidth=0.5)
    whole.set_ylabel("knowledge, arm less base (points)")
    whole.set_title(f"{study.study}: task against knowledge, {len(study.seeds)} seed(s); filled: on the frontier")
    near.set_title("its right end, with paired 95 % intervals")
    right, lowest = best[-1][0], min(y for x, y in best if x >= 0.75 * best[-1][0])
    near.set_xlim(0.75 * right, right + 0.06 * abs(right) + 1)
    near.set_ylim(lowest - 3, max(y for _, y in best) + 2)
    whole.legend(fontsize="small", ncols=2)
    return save(figure, path)


def _dial(axes: Axes, place: int, entries: Sequence[dict[str, Any]], intervals: bool) -> None:
    ordered = sorted(entries, key=lambda entry: entry["dial"] or 0)
    x, y = ([100 * entry[name]["value"] for entry in ordered] for name in ("gain", "kept"))
    style: dict[str, Any] = {"color": plt.get_cmap("tab20")(place % 20), "marker": MARKERS[place % len(MARKERS)]}
    if intervals:
        across, along = _errors(ordered, "gain"), _errors(ordered, "kept")
        axes.errorbar(x, y, xerr=across, yerr=along, color=style["color"], alpha=0.3, linestyle="none", elinewidth=0.8)
    axes.plot(x, y, **style, markerfacecolor="white", markersize=7, linewidth=1, label=drawn_name(ordered[0]["family"]))
    chosen = [position for position, entry in enumerate(ordered) if entry["on_frontier"]]
    axes.plot([x[position] for position in chosen], [y[position] for position in chosen], **style, markersize=7, linestyle="none")


def _errors(entries: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    rows = [entry[name] for entry in entries]
    return 100 * np.array([[row["value"] - row["low"], row["high"] - row["value"]] for row in rows]).clip(min=0).T


def _knowledge(study: Study, records: Sequence[Record], path: Path) -> Path:
    arms = list(study.points)
    frames = frames_of(records, "statement", arms)
    labels = familiarity(frames[0][0]["popularity"].tolist()).labels
    estimates = [estimate_means(frames, "right", in_bucket(label), same_items=study.same_items) for label in labels]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for position, arm in enumerate(arms):
        values = [interval(estimate.value[position], estimate.draws[position], SHARE) for estimate in estimates]
        places = np.arange(len(labels)) + (position - (len(arms) - 1) / 2) * 0.03
        centre = np.array([value.value for value in values])
        errors = np.array([[value.value - value.low, value.high - value.value] for value in values]).clip(min=0).T
        axes.errorbar(places, 100 * centre, yerr=100 * errors, label=drawn_name(arm), marker="o", markersize=4, capsize=2, linewidth=1)
    axes.set_xticks(range(len(labels)), [label.split("=")[1] for label in labels])
    axes.set_xlabel("times the pretraining corpus stated the fact" if labels[0].startswith("k=") else "popularity")
    axes.set_ylabel("statements continued rightly (%)")
    axes.set_title(f"{study.study}: knowledge by exposure, {len(study.seeds)} seed(s), 95 % intervals")
    axes.legend(fontsize="small")
    return save(figure, path)
