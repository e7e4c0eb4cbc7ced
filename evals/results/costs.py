"""The costs of every arm, as numbers and as a table: means over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from evals.display.cells import Table
from evals.results.header import Header
from evals.running.costs import COUNTED, MEASURED

COUNTED_HERE = (*COUNTED, "runs", "flops_a_token", "bytes_a_token")
Costs = Mapping[str, Sequence[Mapping[str, Any]]]  # by arm, one entry per seed


def counted_costs(costs: Costs) -> list[dict[str, Any]]:
    """Costs that are counted: the same in every run."""
    return _means(costs, COUNTED_HERE)


def measured_costs(costs: Costs) -> list[dict[str, Any]]:
    """Costs that a machine measured: seconds, bytes and joules of the tunings. They differ from run to run."""
    return _means(costs, MEASURED)


def _means(costs: Costs, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for arm, of_seeds in costs.items():
        known = {name: [cost[name] for cost in of_seeds] for name in names}
        rows.append({"arm": arm} | {name: None if None in values else round(float(np.mean(values)), 3) for name, values in known.items()})
    return rows


def cost_table(counted: Sequence[Mapping[str, Any]], measured: Sequence[Mapping[str, Any]], header: Header) -> list[Table]:
    """The cost of tuning (expert and all trials included), and of one token relative to the base."""
    if not counted:
        return []
    base = next(row for row in counted if row["arm"] == header.base)
    frame = pd.DataFrame({"arm": [row["arm"] for row in counted]})
    for title, name, scale in (
        ("runs", "runs", 1.0),
        ("steps", "steps", 1.0),
        ("tokens (k)", "tokens", 1e3),
        ("TFLOP", "flops", 1e12),
        ("stored (MB)", "stored_bytes", 1e6),
    ):
        frame[title] = [_amount(row[name], scale) for row in counted]
    for title, name, scale in (("seconds", "seconds", 1.0), ("peak (MB)", "peak_memory", 1e6), ("energy (kJ)", "energy", 1e3)):
        found = {row["arm"]: row[name] for row in measured}
        if any(found.values()):
            frame[title] = [_amount(found.get(arm), scale) for arm in frame["arm"]]
    for title, name in (("FLOPs a token, x base", "flops_a_token"), ("bytes a token, x base", "bytes_a_token")):
        frame[title] = [f"{row[name] / base[name]:.2f}" for row in counted]
    note = "Tuning: means over seeds; the expert and the trials of settings selected in these runs are included; FLOPs as in finetune/flops.py. "
    return [Table("Cost", frame, f"{note}Per token: weights multiplied by and read in decoding, relative to the base alone.")]


def _amount(value: float | None, scale: float) -> str:
    return "" if not value else f"{value / scale:.4g}"
