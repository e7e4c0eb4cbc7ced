"""From records to results: every measure's summary and the comparison across measures, in one object from which tables, figures and JSON are made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from evals.display.cells import Table
from evals.display.chart import Chart
from evals.measures.registry import measures
from evals.records import Record
from evals.results.comparison import PARTS, Row, compare, comparison_charts, comparison_tables, with_comparisons
from evals.results.costs import Costs, cost_table, counted_costs, measured_costs
from evals.results.header import Header, header_of
from evals.results.headline import headline
from evals.results.provenance import provenance_of
from evals.results.recorded import Recorded
from evals.selection import Choices
from evals.study import Run, Study
from proxytune.content import as_json
from proxytune.errors import UserError, brief
from proxytune.files import check_readable

SCHEMA = 3  # of results.json
DIGITS = 6  # to which results.json is rounded


@dataclass(frozen=True)
class Results:
    """`header`: the study; `measures`: each measure's summary by name; `rows`: shares, and what was forgotten, one row per arm and measure;
    `compared`: gap closed, differences, frontier and selections (see `comparison`); `costs`: costs that are counted; `measured`: costs that a machine
    measured.
    """

    header: Header
    measures: dict[str, Any]
    rows: list[Row]
    compared: dict[str, list[Row]]
    costs: list[Row]
    measured: list[Row] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def headline(self) -> list[str]:
        """From rounded numbers, so that these lines are the same when the results are read back."""
        return headline(self.header, self.measures, _rounded(self.compared), _rounded(self.costs))

    def json(self) -> str:
        """The content of results.json, rounded. Measured costs are left out, so that the same study gives the same bytes."""
        header = asdict(self.header)
        summaries = {name: TypeAdapter(type(summary)).dump_python(summary, mode="json") for name, summary in self.measures.items()}
        content = {
            "schema": SCHEMA,
            "headline": self.headline,
            **header,
            "rows": self.rows,
            **self.compared,
            "costs": self.costs,
            "measures": summaries,
            "provenance": self.provenance,
        }
        return as_json(_rounded(content))


def summarize(
    study: Study, records: Sequence[Record], costs: Costs, choices: Mapping[Run, Choices] | None = None, prompts: Mapping[str, str] | None = None
) -> Results:
    """The results of a study's records; `choices` is what its runs selected, `prompts` the first prompt of each frame. Raises `UserError` if records
    of a frame were asked differently."""
    recorded = Recorded(study, records)
    summaries = {name: recorded.summary(name) for name in study.shown}
    rows = [row for name, summary in summaries.items() for row in measures()[name].rows(summary)]
    found = provenance_of(study, records, prompts or {})
    return Results(header_of(study), summaries, rows, compare(recorded, choices), counted_costs(costs), measured_costs(costs), found)


def read_results(path: Path) -> Results:
    """The results in a results.json. Raises `UserError` if it cannot be read as such, or was written by an older version."""
    check_readable(path, "results")
    try:
        content = json.loads(path.read_bytes())
        schema = content.get("schema")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"results: '{path}' cannot be read as results of proxytune compare ({error}); run the study again") from error
    if schema != SCHEMA:
        raise UserError(f"results: '{path}' is of an older version (schema {brief(schema)}, not {SCHEMA}); run the study again")
    try:
        header = TypeAdapter(Header).validate_python({part.name: content[part.name] for part in fields(Header)})
        known = measures()
        summaries = {name: TypeAdapter(known[name].summary).validate_python(summary) for name, summary in content["measures"].items()}
        compared = {part: content[part] for part in PARTS}
        return Results(header, summaries, content["rows"], compared, content["costs"], provenance=content.get("provenance", {}))
    except (KeyError, ValidationError) as error:
        raise UserError(f"results: '{path}' is not what proxytune compare writes ({type(error).__name__}); run the study again") from error


def result_tables(results: Results) -> list[Table]:
    """Tables of the measures that are compared, then the comparison, then all other measures in the study's order, then the costs."""
    compared: list[Table] = []
    others: list[Table] = []
    for name in results.measures:
        (others if measures()[name].role is None else compared).extend(measure_tables(results, name))
    costs = cost_table(results.costs, results.measured, results.header)
    return [*compared, *comparison_tables(results.compared), *others, *costs]


def measure_tables(results: Results, name: str) -> list[Table]:
    """The tables of one measure; the first one of a measure that is compared has the comparison beside its values."""
    measure = measures()[name]
    tables = measure.tables(results.measures[name], results.header)
    return tables if measure.role is None else with_comparisons(tables, name, results.compared)


def result_charts(results: Results) -> list[Chart]:
    charts = list(comparison_charts(results.compared, results.header))
    for name, summary in results.measures.items():
        charts += measures()[name].charts(summary, results.header)
    return charts


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_rounded(value) for value in content]
    return round(content, DIGITS) + 0.0 if isinstance(content, float) else content
