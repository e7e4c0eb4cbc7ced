"""Tables for people and papers, from the results object: on the terminal, in Markdown, in LaTeX, or as JSON."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from tabulate import LATEX_ESCAPE_RULES

from evals.cells import Table as Table
from evals.cells import cell, over
from evals.inside_tables import inside_tables
from proxytune.content import as_json
from proxytune.printable import printable

MEASURES = ("task", "knowledge")


def render(results: dict[str, Any], form: str, width: int = 160, measured: Sequence[dict[str, Any]] = ()) -> str:
    """The results as `table` (of `width` columns), `markdown`, `latex` or `json`. The same results give the same bytes.

    `measured` are costs that differ from run to run: columns of the tables, and not in the JSON.
    """
    return as_json(results) if form == "json" else draw(make_tables(results, measured), form, width)


def draw(tables: Sequence[Table], form: str, width: int) -> str:
    """The tables as `table`, `markdown` or `latex`. Titles, notes and cells may hold any text: none of it acts where it is shown."""
    return DRAWINGS[form]([_escaped(table, ESCAPES[form]) for table in tables], width)


def _escaped(table: Table, escape: Callable[[str], str]) -> Table:
    return Table(escape(table.title), table.frame.fillna("").map(escape).rename(columns=escape), escape(table.note))


def _markdown(tables: Sequence[Table], width: int) -> str:
    # Cells are texts: an answer 007 is not the number 7.
    return "\n\n".join(
        f"**{table.title}**\n\n{table.frame.to_markdown(index=False, disable_numparse=True, colalign=_sides(table.frame))}\n\n{table.note}"
        for table in tables
    )


def _latex(tables: Sequence[Table], width: int) -> str:
    return "\n\n".join(table.frame.to_latex(index=False, escape=False, caption=f"{table.title}. {table.note}") for table in tables)


def _terminal(tables: Sequence[Table], width: int) -> str:
    console = Console(width=width, force_terminal=False, highlight=False)
    with console.capture() as captured:
        for table in tables:
            drawn = RichTable(title=Text(table.title), caption=Text(table.note), title_justify="left", caption_justify="left")
            for column, side in zip(table.frame.columns, _sides(table.frame), strict=True):
                drawn.add_column(Text(column), justify=side)
            for row in table.frame.itertuples(index=False):
                drawn.add_row(*map(Text, row))
            console.print(drawn)
    return captured.get().rstrip()


def _sides(frame: pd.DataFrame) -> list[Literal["left", "right"]]:
    """Columns of numbers stand right, but the first."""
    return ["right" if place and frame.iloc[:, place].str.match(r"-?\d").any() else "left" for place in range(frame.shape[1])]


def _in_markdown(text: str) -> str:
    """Without code, cells, tags, formulas, entities and links; underscores and stars stay, as in names_like_this."""
    return re.sub(r"[\\`|<$]|&(?=#?\w+;)|(?<=\])\(", r"\\\g<0>", printable(text))


def _in_latex(text: str) -> str:
    """Without commands; what begins with a bracket or a star would be taken as an option of the row's end before it."""
    return ("{}" if text.startswith(("[", "*")) else "") + printable(text).translate(str.maketrans(LATEX_ESCAPE_RULES))


DRAWINGS: dict[str, Callable[[Sequence[Table], int], str]] = {"table": _terminal, "markdown": _markdown, "latex": _latex}
ESCAPES: dict[str, Callable[[str], str]] = {"table": printable, "markdown": _in_markdown, "latex": _in_latex}


def make_tables(results: dict[str, Any], measured: Sequence[dict[str, Any]] = ()) -> list[Table]:
    """One table each for task, knowledge, frontier, read-outs of forgetting, what tuning did inside, and costs; those that have rows."""
    rows = pd.DataFrame(results["rows"], columns=["arm", "measure", "value", "low", "high", "n", "unparsed", "tied", "note"])
    tables = [_share(results, rows, measure) for measure in MEASURES if measure in set(rows["measure"])]
    if results["frontier"]:
        tables.append(_frontier(results))
    if results["contrasts"]:
        tables.append(_contrasts(results))
    for prefix, how in (
        ("forgetting", "continuing a statement"),
        ("forgetting/question", "asked in the tuned format"),
        ("forgetting/choice", "choosing among candidates, whatever the format"),
    ):
        buckets = [measure for measure in rows["measure"].unique() if measure.rpartition("/")[0] == prefix]
        if buckets:
            names = {measure: measure.rpartition("/")[2] for measure in buckets}
            tables.append(
                Table(
                    f"Forgotten of what the base knew, {how} (points)", _wide(rows, names, 100), "Base less arm, by exposure; positive is forgotten."
                )
            )
    return [*tables, *inside_tables(results), *([_costs(results, measured)] if results["costs"] else [])]


def _frontier(results: dict[str, Any]) -> Table:
    entries = results["frontier"]
    frame = pd.DataFrame({"point": [entry["arm"] for entry in entries]})
    frame["task gain"] = [cell(entry["gain"], 100) for entry in entries]
    frame["knowledge, arm less base"] = [cell(entry["kept"], 100) for entry in entries]
    frame["on the frontier"] = ["yes" if entry["on_frontier"] else "" for entry in entries]
    frame["in % of draws"] = [f"{entry['share_of_draws'] * 100:.0f}" for entry in entries]
    families = dict.fromkeys(entry["family"] for entry in entries if entry["on_frontier"])
    note = "Points; on the frontier: no other is at least as good at task and knowledge and better at one. "
    return Table("Frontier", frame, f"{note}Arms with a point on it: {', '.join(families)}. Draws: those of the intervals.")


def _contrasts(results: dict[str, Any]) -> Table:
    entries = results["contrasts"]
    names = [f"{entry['arm']} less {entry['less']}" for entry in entries]
    cells = {
        measure: {name: cell(entry, 100) for name, entry in zip(names, entries, strict=True) if entry["measure"] == measure} for measure in MEASURES
    }
    frame = pd.DataFrame({"points": list(dict.fromkeys(names))})
    for measure, of_name in cells.items():
        if of_name:
            frame[measure] = [of_name[name] for name in frame["points"]]
        tests = [entry for entry in entries if entry["measure"] == measure and entry["p"] is not None]
        if tests:
            frame[f"p, {measure}"] = [f"{entry['p']:.2g} ({entry['p_holm']:.2g})" for entry in tests]
            frame[f"detectable, {measure}"] = ["" if entry["detectable"] is None else f"{entry['detectable'] * 100:.1f}" for entry in tests]
    note = "Paired differences in points of per cent, 95 % intervals; p by McNemar's exact test (by Holm's correction for all contrasts)"
    return Table("Contrasts", frame, f"{note}; detectable: the least difference that so many items find four times in five.")


def _costs(results: dict[str, Any], measured: Sequence[dict[str, Any]]) -> Table:
    """What tuning took (all trials and the expert), then a token's pass over the base's."""
    entries = results["costs"]
    base = next(entry for entry in entries if entry["arm"] == results["base"])
    frame = pd.DataFrame({"arm": [entry["arm"] for entry in entries]})
    for title, name, scale in (
        ("runs", "runs", 1.0),
        ("steps", "steps", 1.0),
        ("tokens (k)", "tokens", 1e3),
        ("TFLOP", "flops", 1e12),
        ("stored (MB)", "stored_bytes", 1e6),
    ):
        frame[title] = [_amount(entry[name], scale) for entry in entries]
    for title, name, scale in (("seconds", "seconds", 1.0), ("peak (MB)", "peak_memory", 1e6), ("energy (kJ)", "energy", 1e3)):
        found = {entry["arm"]: entry[name] for entry in measured}
        if any(found.values()):
            frame[title] = [_amount(found.get(arm), scale) for arm in frame["arm"]]
    for title, name in (("FLOPs a token, x base", "flops_a_token"), ("bytes a token, x base", "bytes_a_token")):
        frame[title] = [f"{entry[name] / base[name]:.2f}" for entry in entries]
    note = "Tuning: means over seeds, expert and trials of a chosen dial included, FLOPs by formula (see finetune/flops.py). "
    return Table("Cost", frame, f"{note}A token: weights multiplied by and read when decoding, against the base alone.")


def _amount(value: float | None, scale: float) -> str:
    return "" if not value else f"{value / scale:.4g}"


def _share(results: dict[str, Any], rows: pd.DataFrame, measure: str) -> Table:
    """The table of one share (task or knowledge), with the gap closed and the difference to the direct arm."""
    chosen = rows[rows["measure"] == measure]
    columns = {measure: {row["arm"]: cell(row, 100) for _, row in chosen.iterrows()}}
    columns["unparsed"] = {row["arm"]: str(row["unparsed"]) for _, row in chosen.iterrows()}
    columns |= _ties(chosen)
    ties = "; tied: several choices were equally likely, each counts 1/k" if "tied" in columns else ""
    note = f"Per cent right of {chosen['n'].max()} (unparsed counts as wrong{ties}); 95 % intervals, paired, {over(results)}."
    gaps = [entry for entry in results["gap_closed"] if entry["measure"] == measure]
    if gaps:
        columns["gap closed"] = {entry["arm"]: cell(entry, 100) for entry in gaps}
        columns["capped"] = {entry["arm"]: "" if entry["capped"] is None else f"{entry['capped'] * 100:.1f}" for entry in gaps}
        note += " Gap closed = (arm - base) / (direct - base); n/a where direct - base is within noise."
    for entry in results["against_direct"]:
        if entry["measure"] == measure:
            columns.setdefault(f"less {entry['direct']}", {})[entry["arm"]] = cell(entry, 100)
    return Table(measure.capitalize(), _frame(rows, columns), note)


def _wide(rows: pd.DataFrame, names: dict[str, str], scale: int) -> pd.DataFrame:
    columns = {name: {row["arm"]: cell(row, scale) for _, row in rows[rows["measure"] == measure].iterrows()} for measure, name in names.items()}
    return _frame(rows, columns | _ties(rows[rows["measure"].isin(list(names))]))


def _ties(rows: pd.DataFrame) -> dict[str, dict[str, str]]:
    """A column with each arm's number of tied items, where choices were made."""
    counts = rows.dropna(subset="tied").groupby("arm", sort=False)["tied"].sum()
    return {"tied": {str(arm): f"{count:.0f}" for arm, count in counts.items()}} if len(counts) else {}


def _frame(rows: pd.DataFrame, columns: dict[str, dict[str, str]]) -> pd.DataFrame:
    arms = [arm for arm in rows["arm"].unique() if any(arm in cells for cells in columns.values())]
    return pd.DataFrame({"arm": arms} | {name: [cells.get(arm, "") for arm in arms] for name, cells in columns.items()})
