"""`proxytune frontier`: gain against forgetting for numbers that were measured elsewhere."""

import sys
from dataclasses import asdict
from pathlib import Path

from evals.display.drawing import draw as draw_chart
from evals.display.render import draw
from evals.released.frontiers import find_frontier, frontier_chart, frontier_tables, read_rows
from proxytune.content import as_json
from proxytune.printable import printable


def show_frontier(results: Path, out: Path, form: str) -> None:
    """The tables go to standard output, the figure to `out`."""
    found = find_frontier(*read_rows(results))
    out.mkdir(parents=True, exist_ok=True)
    figures = draw_chart(frontier_chart(found, results.stem), out)
    print(as_json(asdict(found)) if form == "json" else draw(frontier_tables(found, results.stem), form))
    print(f"Files: {printable(', '.join(map(str, figures)))}", file=sys.stderr)
