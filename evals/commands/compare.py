"""`proxytune compare` and `proxytune probe`: run a study, print its tables, write results, figures and answers."""

import gc
from pathlib import Path

from evals.display.drawing import draw as draw_chart
from evals.display.render import draw
from evals.report.page import NAME, write_report
from evals.results.items import FILE, write_items
from evals.results.summary import result_charts, result_tables, summarize
from evals.results.variance import power_table
from evals.running.outlook import outlook_table
from evals.running.progress import Display
from evals.running.runner import run_study
from evals.study import Study
from proxytune.content import as_json
from proxytune.files import check_writable
from proxytune.printable import printable


def run_and_show(study: Study, folder: Path, out: Path, shown: Path, form: str | None, jobs: int | None, patient: bool) -> None:
    """Runs a study. Records go to `out`, results and figures to `shown`, tables to standard output; without a `form` the headline."""
    gc.freeze()  # trainers collect garbage often; they need not look through the libraries each time
    results_file, costs_file = shown / "results.json", shown / "costs.json"
    for path in (out / "study.json", results_file, costs_file, shown / FILE, shown / NAME):
        check_writable(path, "out")  # before hours of work, not after
    with Display() as display:
        finished = run_study(study, folder, out, display, jobs=jobs, patient=patient)
        shown.mkdir(parents=True, exist_ok=True)
        with display.bar("intervals and figures", None):
            results = summarize(study, finished.records, finished.costs, finished.choices, finished.prompts)
            figures = [path for chart in result_charts(results) for path in draw_chart(chart, shown, list(results.header.kinds))]
            results_file.write_text(results.json() + "\n")
            costs_file.write_text(as_json(results.measured) + "\n")
        files = [results_file, costs_file, *figures]
        if form is None:
            print("\n".join(map(printable, results.headline)))
            print(f"The rest: {printable(str(shown / NAME))}, to open in a browser; all tables here with --full.")
        else:
            print(results.json() if form == "json" else draw(result_tables(results), form))
        answered = any("text" in record.items for record in finished.records)
        if answered:
            files.append(write_items(finished.records, shown))
        with display.bar("report", None):
            files.append(write_report(shown))
        following = f"; print answers with: proxytune items {shown} --where 'ARM right, OTHER wrong'" if answered else ""
        display.say(f"Files: {', '.join(map(str, files))}{following}")


def show_plan(study: Study, folder: Path, out: Path, form: str) -> None:
    """Prints the study's jobs, which of them are done, about how long the others take, and what the study will be able to tell. Nothing is tuned,
    read or written."""
    with Display() as display:
        tables = {"jobs": outlook_table(study, folder, out, display), "power": power_table(study, out)}
    rows = {name: table.frame.to_dict("records") for name, table in tables.items()}
    print(as_json(rows) if form == "json" else draw(list(tables.values()), form))
