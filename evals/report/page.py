"""The report: one HTML file that holds everything it shows and asks for nothing."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evals.report.content import MOST_ITEMS, as_script, compressed, items_content, page_content, read_folder
from proxytune.files import check_writable

HERE = Path(__file__).parent
NAME = "report.html"
OF_PLOT = "'sha256-jSYQUrW7J0b3jPqhZP9C2Xh1PyJKHKXd4s0fpGGKrww='"  # the style that Plot 0.6.17 puts into every figure


def write_report(folder: Path) -> Path:
    """Writes `folder`/report.html from the results, costs and answers in the folder. Raises `UserError` if there are no results."""
    target = folder / NAME
    check_writable(target, "folder")
    results, items = read_folder(folder)
    target.write_text(render(page_content(results), items_content(items)), encoding="utf-8")
    return target


def render(content: dict[str, Any], items: dict[str, Any]) -> str:
    """The page. Scripts run and styles apply only if their hash is in the page's policy, so that nothing a model, a file or a name says can act."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    scripts = [(HERE / name).read_text(encoding="utf-8") for name in ("vendor/d3.min.js", "vendor/plot.min.js", "page.js")]
    environment = Environment(
        loader=PackageLoader("evals.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        content,
        most_items=MOST_ITEMS,
        items=Markup(compressed(items)),
        item_count=len(items["items"]),
        item_total=items["all"],
        explained=bool(items["tokens"]),
        readings=items["readings"],
        data=Markup(as_script({name: content[name] for name in ("arms", "frontier", "header")} | {"charts": _charts(content)})),
        style=Markup(style),
        style_hashes=Markup(f"'sha256-{_hash(style)}' {OF_PLOT}"),
        scripts=[Markup(script) for script in scripts],
        hashes=Markup(" ".join(f"'sha256-{_hash(script)}'" for script in scripts)),
    )


def _charts(content: dict[str, Any]) -> dict[str, Any]:
    return {f"{section['name']}-{place}": chart for section in content["sections"] for place, chart in enumerate(section["charts"])}


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
