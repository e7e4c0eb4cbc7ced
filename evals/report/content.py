"""What the report page shows, as plain data: from results.json, costs.json and items.parquet alone, so that the same files give the same page."""

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evals.display.cells import Table
from evals.display.chart import Chart
from evals.measures.registry import measures
from evals.results.comparison import comparison_charts, comparison_tables
from evals.results.costs import cost_table
from evals.results.items import FILE, RUN, numbered, read_items_of
from evals.results.summary import Results, measure_tables, read_results
from proxytune.errors import UserError
from proxytune.files import check_readable
from proxytune.printable import printable

MOST_ITEMS = 20_000  # in the page; how many are left out is said there
UNPARSED = -1.0  # in place of the share that is right


def read_folder(folder: Path) -> tuple[Results, pd.DataFrame]:
    """The results of a study's folder with its measured costs, and its answers (empty if there are none). Raises `UserError`."""
    results = read_results(folder / "results.json")
    costs = folder / "costs.json"
    if costs.exists():
        check_readable(costs, "folder")
        try:
            results.measured.extend(json.loads(costs.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"folder: '{costs}' cannot be read ({error}); run the study again") from error
    return results, read_items_of(folder) if (folder / FILE).exists() else pd.DataFrame()


def page_content(results: Results) -> dict[str, Any]:
    """The page without the answers: sections of the comparison and of every measure, each with its tables and charts."""
    header = results.header
    compared = list(comparison_charts(results.compared, header))
    sections = [_section("comparison", "Comparison", "", "", comparison_tables(results.compared), compared)]
    for name, summary in results.measures.items():
        measure = measures()[name]
        charts = list(measure.charts(summary, header))
        sections.append(_section(name, name.capitalize(), measure.question, measure.controls, measure_tables(results, name), charts))
    sections.append(
        _section("costs", "Costs", "What does each arm cost to make, and a token?", "", cost_table(results.costs, results.measured, header), [])
    )
    return {
        "title": printable(header.study),
        "headline": [printable(line) for line in results.headline],
        "sections": [section for section in sections if section["tables"] or section["charts"]],
        "arms": [printable(arm) for arm in header.kinds],
        "frontier": results.compared["frontier"],
        "header": asdict(header),
        "provenance": _provenance(results),
    }


def _provenance(results: Results) -> list[list[str]]:
    """Rows of a name and a text; a first prompt that several frames share once."""
    found = results.provenance
    rows = [["Study, hash", found["study_hash"]]] if "study_hash" in found else []
    if "versions" in found:
        rows.append(["Versions", ", ".join(f"{name} {number}" for name, number in found["versions"].items())])
    frames: dict[str, list[str]] = {}
    for frame, prompt in found.get("first_prompts", {}).items():
        frames.setdefault(prompt, []).append(frame)
    rows += [[f"Asked, {frame}", f"hash {digest}"] for frame, digest in found.get("asked", {}).items()]
    rows += [[f"First of {', '.join(of)}", prompt] for prompt, of in frames.items()]
    return [[printable(name), printable(text)] for name, text in rows]


def _section(name: str, title: str, question: str, controls: str, tables: Sequence[Table], charts: Sequence[Chart]) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "question": question,
        "controls": controls,
        "tables": [_table(table) for table in tables],
        "charts": [asdict(chart) for chart in charts],
    }


def _table(table: Table) -> dict[str, Any]:
    rows = table.frame.fillna("").astype(str)
    return {
        "title": printable(table.title),
        "note": printable(table.note),
        "columns": [printable(str(column)) for column in rows.columns],
        "rows": [[printable(cell) for cell in row] for row in rows.itertuples(index=False)],
    }


def items_content(items: pd.DataFrame) -> dict[str, Any]:
    """Every item with the answers of all arms: texts once, and their places; and tokens, where an answer is explained. Of more than 20,000 items as
    many are taken: those with tokens, and others evenly spaced."""
    if items.empty:
        return {"readings": [], "arms": [], "texts": [], "items": [], "tokens": [], "all": 0}
    keys = ["reading", *RUN, "number"]
    items = numbered(items)
    arms, readings = list(items["arm"].unique()), list(items["reading"].unique())
    places, texts = pd.factorize(items["text"])
    state = items["right"].where(~items["unparsed"].astype(bool), UNPARSED).astype(float).round(3)
    wide = items.assign(place=places, state=state).pivot(index=keys, columns="arm", values=["place", "state"])
    first = items.drop_duplicates(keys).set_index(keys)[["question", "answer", "popularity"]].reindex(wide.index)
    explained = items[items["tokens"] != ""].set_index(keys)
    with_tokens = np.flatnonzero(wide.index.isin(explained.index))
    spaced = np.linspace(0, len(wide) - 1, min(len(wide), MOST_ITEMS - len(with_tokens))).astype(int)
    taken = np.union1d(spaced, with_tokens)
    chosen, first = wide.iloc[taken], first.iloc[taken]
    of_arms = chosen["place"][arms].fillna(-1).astype(int).to_numpy().tolist()
    rows = [
        [readings.index(reading), _run(world, seed, tuning), printable(question), printable(answer), exposure, given, states]
        for (reading, world, seed, tuning, _), question, answer, exposure, given, states in zip(
            chosen.index,
            first["question"],
            first["answer"],
            _known(first["popularity"].to_numpy(float)),
            of_arms,
            _known(chosen["state"][arms].to_numpy(float)),
            strict=True,
        )
    ]
    places_of = {key: place for place, key in enumerate(chosen.index)}
    tokens = [
        [places_of[key], arms.index(arm), _printable_tokens(said)]
        for key, arm, said in zip(explained.index, explained["arm"], explained["tokens"].astype(str), strict=True)
    ]
    return {
        "readings": readings,
        "arms": list(map(printable, arms)),
        "texts": list(map(printable, texts)),
        "items": rows,
        "tokens": tokens,
        "all": len(wide),
    }


def _printable_tokens(tokens: str) -> list[Any]:
    """For each token: its text, the probability under the mixture and under each member by name, and the base's choice where it is another."""
    return [
        [
            printable(one["token"]),
            one["mixture"],
            {printable(name): value for name, value in one["members"].items()},
            None if one["base"] is None else printable(one["base"]),
        ]
        for one in json.loads(tokens)
    ]


def _run(world: str, seed: int, tuning: int) -> str:
    return " ".join(part for part in (world, f"seed {seed}", f"tuning {tuning}" if tuning else "") if part)


def _known(numbers: np.ndarray) -> list[Any]:
    """As lists, with None for NaN."""
    return np.where(np.isnan(numbers), np.array(None), numbers).tolist()


def as_script(content: object) -> str:
    """JSON that may stand in a script element: no `<`, and no line separators that old parsers take for the end of a line."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def compressed(content: object) -> str:
    """The same, compressed (gzip, the same bytes each time), in base64."""
    return base64.b64encode(gzip.compress(as_script(content).encode(), 9, mtime=0)).decode()
