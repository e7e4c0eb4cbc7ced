"""`proxytune probe`: one probe, or all that the verdict on erosion needs, of a study or of models given by name."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from evals.study import STUDIES, Base, Data, Direct, MeasureName, Models, Study, expanded, explain_invalid, load_study
from proxytune.errors import UserError

INSIDE: tuple[MeasureName, ...] = ("density", "drift", "lens", "restoration", "recoverability")
EROSION = "erosion"


@dataclass(frozen=True)
class Probe:
    """What is probed: a study file or a base model and those tuned from it, with the items to read them by."""

    name: str
    target: str | None
    tuned: Sequence[str]
    knowledge: str | None
    corpus: str | None
    test: str | None
    prompt: str
    threads: int


def probe_study(probe: Probe) -> tuple[Study, Path]:
    """The study that measures just this, and the folder its paths count from; the shipped one of the world where no target is given.

    Raises `UserError` for models without knowledge items, for a study with models beside it, and whatever a study file may raise.
    """
    file = STUDIES / "erosion.yaml" if probe.target is None else Path(probe.target)
    if file.suffix in (".yaml", ".yml"):
        if probe.tuned or probe.knowledge or probe.corpus or probe.test:
            raise UserError(f"probe: '{file}' names its own models and data; give it alone, or give models in its place")
        study, folder = load_study(file)
        outside = [name for name in study.measures if name not in INSIDE] if probe.name == EROSION else []
        return study.model_copy(update={"measures": (*outside, *_measures(probe.name))}), folder
    if probe.knowledge is None:
        raise UserError("--knowledge: models are read by items with statement, answer, choices and popularity; give a file of them")
    if len(set(probe.tuned)) < len(probe.tuned):
        raise UserError(f"probe: {', '.join(probe.tuned)} names a model twice; give each once")
    names = [Path(path).name or path for path in probe.tuned]
    arms = {
        name if names.count(name) == 1 else path: Direct(kind="direct", path=_absolute(path)) for name, path in zip(names, probe.tuned, strict=True)
    }
    try:
        study = Study(
            study=f"probe-{Path(str(probe.target)).name}",
            models=Models(base=_absolute(str(probe.target))),
            data=Data(
                knowledge=_absolute(probe.knowledge),
                corpus=None if probe.corpus is None else _absolute(probe.corpus),
                test=None if probe.test is None else _absolute(probe.test),
                prompt=probe.prompt,
            ),
            arms={"base": Base(kind="base"), **arms},
            measures=_measures(probe.name),
            threads=probe.threads,
        )
    except ValidationError as error:
        raise UserError(f"probe: {explain_invalid(error)}") from error
    return study, Path()


def _measures(name: str) -> tuple[MeasureName, ...]:
    return INSIDE if name == EROSION else tuple(measure for measure in INSIDE if measure == name)


def _absolute(name: str) -> str:
    return str(expanded(name).absolute()) if expanded(name).exists() else name
