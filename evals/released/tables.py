"""The tables of released generations that were scored again."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from evals.display.cells import Table


def rescore_tables(results: Mapping[str, Any]) -> list[Table]:
    """One table for every benchmark, then toxicity by group, the gap closed, its summary and the exact tests; tables without rows are left out."""
    rows = results["rows"]
    wholes = [row for row in rows if "/" not in row["metric"]]
    tables = [
        _shares(benchmark, [row for row in wholes if row["benchmark"] == benchmark])
        for benchmark in dict.fromkeys(row["benchmark"] for row in wholes)
    ]
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows if "/" in row["metric"]):
        tables.append(_parts(benchmark, [row for row in rows if row["benchmark"] == benchmark and "/" in row["metric"]]))
    if results["gap_closed"]:
        tables.append(_gap_table(results["gap_closed"]))
    if results["gap_summary"]:
        tables.append(_summary_table(results["gap_summary"]))
    if results["mcnemar"]:
        tables.append(_test_table(results["mcnemar"]))
    if results["notes"]:
        tables.append(
            Table("Notes", pd.DataFrame({"what": list(results["notes"])}), "What was left out, and answers that the release parses differently.")
        )
    return tables


def _shares(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    frame = pd.DataFrame(
        {
            "system": [row["system"] for row in rows],
            "metric": [row["metric"] for row in rows],
            "ours": [_with_interval(row["ours"], row["low"], row["high"]) for row in rows],
            "published": [_percent(row["published"], 2) for row in rows],
            "difference": [_percent(row["difference"], 2, sign="+") for row in rows],
            "n": [str(row["n"]) for row in rows],
            "unparsed": [str(row["unparsed"]) for row in rows],
            "note": [row["note"] for row in rows],
        }
    )
    return Table(benchmark, frame, "Per cent with 95 % intervals (bootstrap over items); difference is ours minus published, in percentage points.")


def _parts(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = {(row["metric"], row["system"]): row for row in rows}
    parts, systems = dict.fromkeys(row["metric"] for row in rows), dict.fromkeys(row["system"] for row in rows)
    frame = pd.DataFrame({"part": list(parts)})
    for system in systems:
        found = [cells.get((part, system)) for part in parts]
        frame[system] = ["" if row is None else f"{_percent(row['ours'], 1)} ({_percent(row['published'], 1)})" for row in found]
    return Table(f"{benchmark}, by part", frame, "Per cent, published in brackets.")


def _gap_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    frame = pd.DataFrame(
        {
            "benchmark": [row["benchmark"] for row in rows],
            "metric": [row["metric"] for row in rows],
            "arm": [f"{row['arm']} ({row['role']})" for row in rows],
            "base": [row["base"] for row in rows],
            "direct": [row["direct"] for row in rows],
            "gap closed": ["n/a" if row["value"] is None else _with_interval(row["value"], row["low"], row["high"]) for row in rows],
            "capped": [_percent(row["capped"], 1) for row in rows],
            "published": [_percent(row["published"], 1) for row in rows],
            "note": [row["note"] for row in rows],
        }
    )
    note = "(arm - base) in per cent of (direct - base), 95 % intervals, paired bootstrap over items; published: the same from published numbers."
    return Table("Gap closed", frame, note)


def _summary_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    frame = pd.DataFrame({"arm": [row["role"] + (f" ({row['roles'] + 1})" if row["roles"] else "") for row in rows]})
    frame["reading"] = [row["reading"] for row in rows]
    frame["smallest"] = [f"{_percent(row['minimum'], 1)} ({row['at']})" for row in rows]
    for title, name in (("mean", "mean"), ("mean, each capped", "mean_capped")):
        frame[title] = [_percent(row[name], 2) for row in rows]
    for title, name in (("gaps", "gaps"), ("of them published only", "unchecked"), ("within noise, left out", "within_noise")):
        frame[title] = [str(row[name]) for row in rows]
    return Table("Gap closed over benchmarks", frame, "Per cent, over the headline metric of every benchmark and triple.")


def _test_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    frame = pd.DataFrame({"benchmark": [row["benchmark"] for row in rows]})
    for title, name in (("metric", "metric"), ("system", "system"), ("other", "other"), ("only system", "only_system"), ("only other", "only_other")):
        frame[title] = [str(row[name]) for row in rows]
    for name in ("p", "holm"):
        frame[name] = [f"{row[name]:.2g}" if row[name] > 0 else "<1e-300" for row in rows]
    note = (
        "McNemar's exact test: items that one system alone has (right, toxic, preferred). holm: adjusted for all pairs of the benchmark and metric."
    )
    return Table("Systems against each other", frame, note)


def _percent(value: float | None, digits: int, sign: str = "") -> str:
    return "" if value is None else f"{round(value * 100, digits) + 0.0:{sign}.{digits}f}"


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    return "" if value is None else f"{_percent(value, 2)} [{_percent(low, 1)}, {_percent(high, 1)}]"
