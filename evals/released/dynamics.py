"""Released training dynamics of density: a JSON list with one object for each evaluation, whose keys are `step` and GROUP_METRIC.

Metrics are those of `probes/density.py` under the names of the released files (`METRICS`), and accuracy and loss. The first group (such as `id`, the
questions in distribution) is what the others are compared with. Not covered: intervals. The evaluations are of one run, and follow each other, so
that their spread says how steady the run is, not how certain a difference is.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from evals.display.cells import Columns, Table, table
from evals.display.chart import Axis, Chart, Panel, Series
from evals.statistics.value import Value
from proxytune.errors import UserError, brief
from proxytune.files import check_readable

METRICS = {
    "top5pct_energy": "E5 (higher is sparser)",
    "top10pct_energy": "E10 (higher is sparser)",
    "effective_rank": "effective rank (higher is denser)",
    "l1_norm": "L1 norm",
    "acc": "accuracy",
    "loss": "loss",
}
DENSITIES = ("top5pct_energy", "effective_rank")  # drawn
ROWS = TypeAdapter(list[dict[str, FiniteFloat]])


@dataclass(frozen=True)
class Settled:
    """One metric of one group: its mean over the last evaluations, and its difference from the first group with its standard deviation over them."""

    group: str
    metric: str
    mean: float
    difference: float
    sd: float


@dataclass(frozen=True)
class Dynamics:
    """`settled` is over the `evaluations` from step `from_step` on."""

    name: str
    from_step: int
    evaluations: int
    settled: tuple[Settled, ...]


def read_dynamics(path: Path) -> pd.DataFrame:
    """A frame with the columns step, group, metric, value. Raises `UserError` for a file that is not of that form."""
    check_readable(path, "--dynamics")
    try:
        rows = ROWS.validate_python(json.loads(path.read_text(encoding="utf-8")), strict=True)
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        raise UserError(
            f"--dynamics: '{path}' must be a JSON list of objects whose values are numbers ({str(error).splitlines()[0]}); give another file"
        ) from error
    found = [
        (row["step"], key.removesuffix(f"_{metric}"), metric, value)
        for row in rows
        for key, value in row.items()
        for metric in METRICS
        if "step" in row and key.endswith(f"_{metric}")
    ]
    if not found:
        keys = ", ".join(list(rows[0])[:5]) if rows else "nothing"
        raise UserError(f"--dynamics: '{path}' must hold step and keys that end with {', '.join(METRICS)}, not {brief(keys)}; give another file")
    return pd.DataFrame(found, columns=["step", "group", "metric", "value"])


def settle(frame: pd.DataFrame, name: str, from_step: int) -> Dynamics:
    """Means over the evaluations from a step on. Raises `UserError` where there are fewer than two."""
    late = frame[frame["step"] >= from_step]
    evaluations = late["step"].nunique()
    if evaluations < 2:
        last = int(frame["step"].max())
        raise UserError(f"--from-step: two evaluations or more are needed, '{name}' has {evaluations} from step {from_step} on; its last is {last}")
    groups, settled = list(dict.fromkeys(frame["group"])), []
    for metric in dict.fromkeys(frame["metric"]):
        wide = late[late["metric"] == metric].pivot_table(index="step", columns="group", values="value")
        for group in groups:
            if group in wide and groups[0] in wide:
                apart = (wide[group] - wide[groups[0]]).to_numpy()
                settled.append(Settled(group, metric, float(wide[group].mean()), float(np.nanmean(apart)), float(np.nanstd(apart, ddof=1))))
    return Dynamics(name, from_step, evaluations, tuple(settled))


def dynamics_table(found: Dynamics) -> list[Table]:
    groups = list(dict.fromkeys(row.group for row in found.settled))
    columns: Columns = {}
    for row in found.settled:
        columns.setdefault(row.group, {})[METRICS[row.metric]] = f"{row.mean:.5g}"
        if row.group != groups[0]:
            columns.setdefault(f"{row.group} minus {groups[0]}", {})[METRICS[row.metric]] = f"{row.difference:+.5f} (sd {row.sd:.5f})"
    note = (
        f"Means over the {found.evaluations} evaluations from step {found.from_step} on. sd: of the difference over these evaluations, which are of "
        "one run and follow each other: it says how steady the run is, not how certain the difference."
    )
    return table(f"Density in training, {found.name}", [METRICS[row.metric] for row in found.settled], columns, note, first="metric")


def dynamics_chart(frame: pd.DataFrame, name: str) -> Chart:
    """E5 and effective rank over the steps, a line for each group."""
    panels = []
    for metric in DENSITIES:
        chosen = frame[frame["metric"] == metric]
        lines = tuple(
            Series("line", tuple(map(Value, of["value"].tolist())), tuple(of["step"].tolist()), label=str(group))
            for group, of in chosen.groupby("group", sort=False)
        )
        if lines:
            panels.append(Panel(lines, METRICS[metric], Axis("step"), Axis("mean over questions")))
    return Chart("density-dynamics", f"Density in training, {name}", tuple(panels), across=2)
