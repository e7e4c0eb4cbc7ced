"""Imports go down only, and each package's table of contents can be imported."""

import ast
from pathlib import Path

import pytest

FLOORS = ["proxytune", "finetune", "probes", "evals"]
ROOT = Path(__file__).parent.parent


def upward_imports(source: str, floor: str) -> list[str]:
    above = FLOORS[FLOORS.index(floor) + 1 :]
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            names = [node.module or ""]
        found += [name for name in names if name.split(".")[0] in above]
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_only(floor: str) -> None:
    files = list((ROOT / floor).rglob("*.py"))
    assert files
    assert {str(path): upward_imports(path.read_text(), floor) for path in files if upward_imports(path.read_text(), floor)} == {}


def test_an_upward_import_is_seen() -> None:
    assert upward_imports("def f():\n    from evals.study import Study\n", "probes") == ["evals.study"]
