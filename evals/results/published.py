"""Several studies in one table, as papers print them: the arms of every base, the gap closed, and the costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from evals.display.cells import Table, cell
from evals.invalid import did_you_mean
from evals.results.summary import Results, read_results
from evals.statistics.value import value_in
from proxytune.errors import UserError

NOISE, UNPARSED, CONSTRUCTION, ABSENT = "(a)", "(b)", "(c)", "(d)"
MANY = 0.01  # a share of unparsed answers that is worth a footnote
FOOTNOTES = {
    NOISE: "direct minus base is within noise, so that no share of it can be given",
    UNPARSED: "one answer in a hundred or more could not be parsed and counts as wrong",
    CONSTRUCTION: "by construction, not measured",
    ABSENT: "not in this study",
}


def read_runs(runs: Sequence[str]) -> dict[str, Results]:
    """The results of each folder by name: NAME of NAME=FOLDER, otherwise the study's. Raises `UserError` for two of one name."""
    found: dict[str, Results] = {}
    for run in runs:
        name, _, folder = ("", "", run) if Path(run).is_dir() else run.partition("=")
        results = read_results(Path(folder) / "results.json")
        if (name or results.header.study) in found:
            raise UserError(f"tables: there are two studies called {name or results.header.study!r}; name them: NAME=FOLDER")
        found[name or results.header.study] = results
    return found


def published_table(runs: Mapping[str, Results], arms: Sequence[str] = ()) -> Table:
    """One row for every arm of every study (of `arms`, if given, in that order): what is compared in per cent, the gap closed of each gain, FLOPs of
    tuning, and FLOPs of a token relative to the base. Raises `UserError` for an arm that no study has."""
    known = list(dict.fromkeys(arm for results in runs.values() for arm in results.header.kinds))
    for arm in arms:
        if arm not in known:
            raise UserError(f"--arm: no study has an arm {arm!r}; {did_you_mean(arm, known)}")
    measures = list(dict.fromkeys(row["measure"] for results in runs.values() for row in results.compared["against_direct"]))
    gains = list(dict.fromkeys(row["measure"] for results in runs.values() for row in results.compared["gap_closed"]))
    rows = [
        {"study": name, "arm": arm}
        | {measure: _share(results, arm, measure) for measure in measures}
        | {f"gap closed, {measure}": _gap(results, arm, measure) for measure in gains}
        | _costs(results, arm)
        for name, results in runs.items()
        for arm in (arms or results.header.kinds)
        if arm in results.header.kinds
    ]
    frame = pd.DataFrame(rows, dtype=str)
    used = [f"{mark} {words}" for mark, words in FOOTNOTES.items() if any(frame[column].str.endswith(mark).any() for column in frame)]
    references = "; ".join(f"{name}: {', '.join(results.header.direct[:1])}" for name, results in runs.items())
    note = (
        f"Per cent, with paired 95 % intervals. Gap closed = (arm - base) / (direct - base), in per cent; direct is {references}. Tuning: all trials "
        "included. A token: FLOPs of decoding, relative to the base alone."
    )
    return Table("Base, proxy and direct", frame, " ".join([note, *(f"{one}." for one in used)]))


def _share(results: Results, arm: str, measure: str) -> str:
    for row in results.rows:
        if (row["arm"], row["measure"]) == (arm, measure):
            shown = cell(value_in(row), 100)
            return f"{shown} {UNPARSED}" if row["unparsed"] >= MANY * row["n"] else shown
    return f"n/a {ABSENT}"


def _gap(results: Results, arm: str, measure: str) -> str:
    direct = next(iter(results.header.direct), None)
    if arm in (results.header.base, direct):
        return f"{0 if arm == results.header.base else 100} {CONSTRUCTION}"
    for row in results.compared["gap_closed"]:
        if (row["arm"], row["direct"], row["measure"]) == (arm, direct, measure):
            return f"n/a {NOISE}" if row["value"] is None else cell(value_in(row), 100, 0)
    return f"n/a {ABSENT}"


def _costs(results: Results, arm: str) -> dict[str, str]:
    costs = {row["arm"]: row for row in results.costs}
    if arm not in costs:
        return {"tuning (TFLOP)": f"n/a {ABSENT}", "a token, x base": f"n/a {ABSENT}"}
    token, base = costs[arm]["flops_a_token"], costs[results.header.base]["flops_a_token"]
    return {"tuning (TFLOP)": f"{(costs[arm]['flops'] or 0) / 1e12:.4g}", "a token, x base": f"{token / base:.2f}"}
