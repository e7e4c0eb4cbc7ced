"""Two pictures of a study: what each arm still knows by exposure, and how tuning changed density layer by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evals.arms import arm_names
from evals.compare import Record
from evals.results import DENSITY_METRIC, density_change, estimate_means, frames_of, in_bucket, states_of
from evals.statistics import Interval, interval
from evals.study import Direct, Study
from probes.forgetting import familiarity


def draw_figures(study: Study, records: Sequence[Record], results: dict[str, Any], out: Path) -> list[Path]:
    """Draws the figures that the study's measures allow and returns where they are."""
    drawn = []
    if "forgetting" in study.measures:
        drawn.append(_knowledge(study, records, out / "knowledge-by-exposure.png"))
    if "density" in study.measures and any(isinstance(arm, Direct) for arm in study.arms.values()):
        drawn.append(_density(study, records, results, out / "density-by-layer.png"))
    return drawn


def _knowledge(study: Study, records: Sequence[Record], path: Path) -> Path:
    arms = arm_names(study)
    frames = frames_of(records, "statement", arms)
    labels = familiarity(frames[0][0]["popularity"].tolist()).labels
    estimates = [estimate_means(frames, "right", in_bucket(label)) for label in labels]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for position, arm in enumerate(arms):
        values = [interval(estimate.value[position], estimate.draws[position]) for estimate in estimates]
        places = np.arange(len(labels)) + (position - (len(arms) - 1) / 2) * 0.03
        centre = np.array([value.value for value in values])
        errors = np.array([[value.value - value.low, value.high - value.value] for value in values]).clip(min=0).T
        axes.errorbar(places, 100 * centre, yerr=100 * errors, label=arm, marker="o", markersize=4, capsize=2, linewidth=1)
    axes.set_xticks(range(len(labels)), [label.split("=")[1] for label in labels])
    axes.set_xlabel("times the pretraining corpus stated the fact" if labels[0].startswith("k=") else "popularity")
    axes.set_ylabel("statements continued rightly (%)")
    axes.set_title(f"{study.study}: knowledge by exposure, {len(study.seeds)} seed(s), 95 % intervals")
    axes.legend(fontsize="small")
    return _save(figure, path)


def _density(study: Study, records: Sequence[Record], results: dict[str, Any], path: Path) -> Path:
    """Left: does density tell familiar from unfamiliar in the base? Right: what tuning changed of that."""
    direct = [name for name, arm in study.arms.items() if isinstance(arm, Direct)]
    frames = frames_of(records, "density", [study.base_arm, *direct])
    states = range(states_of(frames[0][0]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharex=True)
    for label in ("base", "untrained"):
        _line(left, label, [Interval(**entry[label]) for entry in results["density_of_base"]])
    for position, arm in enumerate(direct, start=1):
        changes = [density_change(frames, position, [f"{DENSITY_METRIC}/pre/{state}"]) for state in states]
        _line(right, arm, [interval(change.value[0], change.draws[0]) for change in changes])
    left.set_title(f"{study.study}: density of the base")
    left.set_ylabel("effective rank, familiar less unfamiliar")
    right.set_title("what tuning changed of it (proxies: nothing, by construction)")
    for axes in (left, right):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("residual stream after layer (0: embeddings)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return _save(figure, path)


def _line(axes: Axes, label: str, intervals: Sequence[Interval]) -> None:
    values = np.array(intervals)
    axes.plot(range(len(values)), values[:, 0], label=label, marker="o", markersize=4)
    axes.fill_between(range(len(values)), values[:, 1], values[:, 2], alpha=0.15)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path
