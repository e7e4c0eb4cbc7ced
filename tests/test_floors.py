"""Imports go down only, and each package's table of contents can be imported."""

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

FLOORS = ["proxytune", "finetune", "probes", "evals"]
ROOT = Path(__file__).parent.parent
# What `evals.study.run` imports when it is called: a script needs one place to import a study and its run from.
DOORS = {"evals.study": {"evals.results.summary", "evals.running.progress", "evals.running.runner"}}


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


def imports_within(floor: Path) -> dict[str, set[str]]:
    """The modules of a floor, and which of its modules each imports, in functions and under TYPE_CHECKING too. Tables of contents are left out."""
    sources = {
        ".".join(path.relative_to(floor.parent).with_suffix("").parts): path.read_text() for path in floor.rglob("*.py") if path.name != "__init__.py"
    }
    return {module: imported_by(source) & sources.keys() for module, source in sources.items()}


def imported_by(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle of imports; none where there is no circle."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("floor", FLOORS)
def test_no_modules_import_each_other(floor: str) -> None:
    imports = imports_within(ROOT / floor)
    assert any(imports.values())
    for module, above in DOORS.items():
        if module in imports:
            assert above <= imports[module], "what is no longer imported is no exception either"
            imports[module] -= above
    assert circle(imports) == []


@pytest.mark.parametrize("hidden", ["import", "def f():\n    import", "if TYPE_CHECKING:\n    import"])
def test_a_circle_is_seen(tmp_path: Path, hidden: str) -> None:
    (tmp_path / "floor").mkdir()
    (tmp_path / "floor" / "one.py").write_text(f"{hidden} floor.two")
    (tmp_path / "floor" / "two.py").write_text("from floor import three\n")
    (tmp_path / "floor" / "three.py").write_text("from floor.one import something\n")
    assert set(circle(imports_within(tmp_path / "floor"))) == {"floor.one", "floor.two", "floor.three"}
