"""Tables for people, papers and other programs: on the terminal, in Markdown, LaTeX (with the package booktabs), HTML or CSV."""

import re
import shutil
from collections.abc import Callable, Sequence
from typing import Literal

import pandas as pd
from markupsafe import escape as html_escape
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text
from tabulate import LATEX_ESCAPE_RULES

from evals.display.cells import Table
from proxytune.printable import printable


def draw(tables: Sequence[Table], form: str, width: int | None = None) -> str:
    """The tables as `table`, `markdown`, `latex`, `html` or `csv`. Titles, notes and cells may hold any text; it is escaped for the form.
    `width` is that of the terminal, unless it is given."""
    return DRAWINGS[form]([_escaped(table, ESCAPES[form]) for table in tables], width or shutil.get_terminal_size((160, 24)).columns)


def _escaped(table: Table, escape: Callable[[str], str]) -> Table:
    return Table(escape(table.title), table.frame.fillna("").map(escape).rename(columns=escape), escape(table.note))


def _markdown(tables: Sequence[Table], width: int) -> str:
    # Cells are text: an answer 007 is not the number 7.
    return "\n\n".join(
        f"**{table.title}**\n\n{table.frame.to_markdown(index=False, disable_numparse=True, colalign=_sides(table.frame))}\n\n{table.note}"
        for table in tables
    )


def _latex(tables: Sequence[Table], width: int) -> str:
    return "\n\n".join(
        table.frame.to_latex(
            index=False,
            escape=False,
            caption=f"{table.title}. {table.note}",
            position="tbp",
            column_format="".join(side[0] for side in _sides(table.frame)),
        )
        for table in tables
    )


def _html(tables: Sequence[Table], width: int) -> str:
    return "\n".join(f"<h2>{table.title}</h2>\n{table.frame.to_html(index=False, escape=False, border=0)}\n<p>{table.note}</p>" for table in tables)


def _csv(tables: Sequence[Table], width: int) -> str:
    """One table is a file of its own; several are under their titles. Notes are left out."""
    texts = [table.frame.to_csv(index=False, lineterminator="\n").rstrip("\n") for table in tables]
    return texts[0] if len(texts) == 1 else "\n\n".join(f"# {table.title}\n{text}" for table, text in zip(tables, texts, strict=True))


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
    """Columns of numbers are aligned right, except the first column."""
    return ["right" if place and frame.iloc[:, place].str.match(r"-?\d").any() else "left" for place in range(frame.shape[1])]


def _in_markdown(text: str) -> str:
    """Escapes code, cells, tags, formulas, entities and links. Underscores and stars stay, as in names_like_this."""
    return re.sub(r"[\\`|<$]|&(?=#?\w+;)|(?<=\])\(", r"\\\g<0>", printable(text))


def _in_latex(text: str) -> str:
    """Escapes commands. A text that begins with a bracket or a star would be read as an option of the preceding end of row."""
    return ("{}" if text.startswith(("[", "*")) else "") + printable(text).translate(str.maketrans(LATEX_ESCAPE_RULES))


def _in_html(text: str) -> str:
    return str(html_escape(printable(text)))


def _in_csv(text: str) -> str:
    """A text that a spreadsheet would take for a formula begins with an apostrophe; numbers with a sign stay."""
    shown = printable(text)
    return f"'{shown}" if shown[:1] in tuple("=+-@") and not re.fullmatch(r"[+-][\d.]+( [\[*].*)?", shown) else shown


DRAWINGS: dict[str, Callable[[Sequence[Table], int], str]] = {
    "table": _terminal,
    "markdown": _markdown,
    "latex": _latex,
    "html": _html,
    "csv": _csv,
}
ESCAPES: dict[str, Callable[[str], str]] = {
    "table": printable,
    "markdown": _in_markdown,
    "latex": _in_latex,
    "html": _in_html,
    "csv": _in_csv,
}
