"""`proxytune probe`: one measure, with the measures it is built on, for a study or for models given by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evals.entities import CITIES
from evals.measures.registry import measures
from evals.study import STUDIES, Study, expanded, explain_invalid, load_study
from proxytune.errors import UserError


@dataclass(frozen=True)
class Probe:
    """The arguments of the command: a study file, or a base model and models tuned from it, with the items to measure them on.

    `teach`: the base is taught made-up names, by the shipped study `taught`.
    """

    name: str
    target: str | None
    tuned: Sequence[str]
    knowledge: str | None
    corpus: str | None
    test: str | None
    prompt: str
    threads: int
    teach: bool = False


def probe_study(probe: Probe) -> tuple[Study, Path]:
    """The study that measures this one measure, and the folder its paths are relative to. Without a target: the shipped erosion study.

    Raises `UserError` for models without knowledge items where the measure needs them, for a study file together with models, and for
    mistakes in a study file.
    """
    file = STUDIES / "erosion.yaml" if probe.target is None else Path(probe.target)
    if file.suffix in (".yaml", ".yml"):
        if probe.tuned or probe.knowledge or probe.corpus or probe.test:
            raise UserError(f"probe: '{file}' names its own models and data; give it alone, or give models in its place")
        study, folder = load_study(file)
        wanted = _measures(probe.name)
        # A verdict may use the study's other measures; a single measure needs nothing else.
        beside = [name for name in study.measures if name not in wanted and len(wanted) > 1]
        content = study.model_dump() | {"measures": (*beside, *wanted)}
        return _validated(content), folder
    if probe.teach:
        return _taught(probe)
    if probe.knowledge is None and any(need.startswith("knowledge") for name in _measures(probe.name) for need in measures()[name].needs):
        raise UserError("--knowledge: models are read by items with statement, answer, choices and popularity; give a file of them")
    if len(set(probe.tuned)) < len(probe.tuned):
        raise UserError(f"probe: {', '.join(probe.tuned)} names a model twice; give each once")
    names = [Path(path).name or path for path in probe.tuned]
    arms = {
        name if names.count(name) == 1 else path: {"kind": "direct", "path": _absolute(path)} for name, path in zip(names, probe.tuned, strict=True)
    }
    content = {
        "study": f"probe-{Path(str(probe.target)).name}",
        "models": {"base": _absolute(str(probe.target))},
        "data": {
            "knowledge": None if probe.knowledge is None else _absolute(probe.knowledge),
            "entities": CITIES if probe.knowledge is None else None,
            "corpus": None if probe.corpus is None else _absolute(probe.corpus),
            "test": None if probe.test is None else _absolute(probe.test),
            "prompt": probe.prompt,
        },
        "arms": {"base": {"kind": "base"}, **arms},
        "measures": _measures(probe.name),
        "threads": probe.threads,
    }
    return _validated(content), Path()


def _taught(probe: Probe) -> tuple[Study, Path]:
    """The shipped study of a lesson, on the given model."""
    if probe.name != "density" or probe.tuned or probe.knowledge or probe.corpus or probe.test:
        raise UserError("--teach: give the measure density and one model, and no data: proxytune probe density MODEL --teach")
    study, folder = load_study(STUDIES / "taught.yaml")
    changes = {"study": f"taught-{Path(str(probe.target)).name}", "models": {"base": _absolute(str(probe.target))}, "threads": probe.threads}
    return _validated(study.model_dump() | changes), folder


def _validated(content: dict[str, Any]) -> Study:
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise UserError(f"probe: {explain_invalid(error)}") from error


def _measures(name: str) -> tuple[str, ...]:
    """The measure, preceded by those that it is built on. Raises `UserError` if there is no measure of that name."""
    known = measures()
    if name not in known:
        raise UserError(f"probe: there is no measure '{name}'; there are {', '.join(sorted(known))}")
    return (*known[name].built_on, name)


def _absolute(name: str) -> str:
    return str(expanded(name).absolute()) if expanded(name).exists() else name
