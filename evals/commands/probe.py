"""`proxytune probe`: one measure, with the measures it is built on, for a study or for models given by name."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers.utils import CONFIG_NAME

from evals.display.drawing import draw as draw_chart
from evals.display.render import draw
from evals.entities import CITIES
from evals.given import absolute, direct_arms, study_of
from evals.measures.registry import measures
from evals.measures.separation import step_of
from evals.released.dynamics import dynamics_chart, dynamics_table, read_dynamics, settle
from evals.released.scores import plain, read_scores, score_matrix, score_tables
from evals.running.progress import Display
from evals.study import STUDIES, Study, load_study
from probes.bias import LABELS, MOST, count
from proxytune.content import as_json
from proxytune.errors import UserError, brief
from proxytune.printable import printable


@dataclass(frozen=True)
class Probe:
    """The arguments of the command: a study file, or a base model and models tuned from it, with the items to measure them on.

    `teach`: the base is taught made-up names, by the shipped study `taught`. `checkpoints` are models of one run, or folders of such: the last one is
    the base, the others are the arms.
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
    checkpoints: Sequence[str] = ()


def probe_study(probe: Probe) -> tuple[Study, Path]:
    """The study that measures this one measure, and the folder its paths are relative to. Without a target: the shipped erosion study.

    Raises `UserError` for models without knowledge items where the measure needs them, for a study file together with models, and for
    mistakes in a study file.
    """
    if probe.checkpoints:
        probe = _of_run(probe)
    file = STUDIES / "erosion.yaml" if probe.target is None else Path(probe.target)
    if file.suffix in (".yaml", ".yml"):
        if probe.tuned or probe.knowledge or probe.corpus or probe.test:
            raise UserError(f"probe: '{file}' names its own models and data; give it alone, or give models in its place")
        study, folder = load_study(file)
        wanted = _measures(probe.name)
        # A verdict may use the study's other measures; a single measure needs nothing else.
        beside = [name for name in study.measures if name not in wanted and len(wanted) > 1]
        content = study.model_dump() | {"measures": (*beside, *wanted)}
        return study_of("probe", content), folder
    if probe.teach:
        return _taught(probe)
    if probe.knowledge is None and any(need.startswith("knowledge") for name in _measures(probe.name) for need in measures()[name].needs):
        raise UserError("--knowledge: models are read by items with statement, answer, choices and popularity; give a file of them")
    arms = direct_arms("probe", probe.tuned)
    content = {
        "study": f"probe-{Path(str(probe.target)).name}",
        "models": {"base": absolute(str(probe.target))},
        "data": {
            "knowledge": None if probe.knowledge is None else absolute(probe.knowledge),
            "entities": CITIES if probe.knowledge is None else None,
            "corpus": None if probe.corpus is None else absolute(probe.corpus),
            "test": None if probe.test is None else absolute(probe.test),
            "prompt": probe.prompt,
        },
        "arms": {"base": {"kind": "base"}, **arms},
        "measures": _measures(probe.name),
        "threads": probe.threads,
    }
    return study_of("probe", content), Path()


def _of_run(probe: Probe) -> Probe:
    """The probe whose base is the last checkpoint, with the others in the order of their steps."""
    if probe.target is not None or probe.tuned or probe.teach:
        raise UserError("--checkpoints: the last checkpoint is the base; give no other model or study beside them")
    found = [each for name in probe.checkpoints for each in (_models_in(Path(name)) if Path(name).is_dir() else [name])]
    steps = {name: step_of(Path(name).name) for name in found}
    if len(found) < 2 or None in steps.values():
        nameless = next((name for name, step in steps.items() if step is None), None)
        seen = f"{len(found)} of them" if nameless is None else f"'{nameless}'"
        raise UserError(f"--checkpoints: give two models or more whose names have a step, such as step-1000, or a folder of them, not {seen}")
    *earlier, last = sorted(found, key=lambda name: steps[name] or 0)
    return replace(probe, target=last, tuned=earlier, checkpoints=())


def _models_in(folder: Path) -> list[str]:
    """The folder itself if it holds a model, else the folders in it that do."""
    if (folder / CONFIG_NAME).exists():
        return [str(folder)]
    return [str(each.parent) for each in folder.glob(f"*/{CONFIG_NAME}")]


def show_dynamics(file: Path, from_step: int, out: Path | None, form: str) -> None:
    """Released training dynamics: the table goes to standard output, the figure to `out` (default: proxytune-runs/dynamics)."""
    frame = read_dynamics(file)
    found = settle(frame, file.stem, from_step)
    folder = out or Path("proxytune-runs") / "dynamics"
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw_chart(dynamics_chart(frame, file.stem), folder)
    print(as_json(asdict(found)) if form == "json" else draw(dynamics_table(found), form))
    print(f"Files: {printable(', '.join(map(str, figures)))}", file=sys.stderr)


def show_scores(name: str, file: Path, leave_out: Sequence[str], form: str) -> None:
    """A released matrix of bias scores: tables, or JSON with unrounded numbers."""
    if name != "bias":
        raise UserError(f"--scores: a matrix of bias scores belongs to the measure bias, not {brief(name)}; run proxytune probe bias --scores FILE")
    matrix = read_scores(file, leave_out)
    total = sum(min(MOST, count(matrix.labels[label], matrix.labels[other])) for label, other in (LABELS, LABELS[::-1]))
    with Display() as display:
        for column, why in matrix.left_out.items():
            display.say(f"{column}: left out, {why}")
        with display.bar("permutations", total) as progress:
            found = score_matrix(matrix, progress)
    print(json.dumps(plain(found), indent=1, allow_nan=False, ensure_ascii=True) if form == "json" else draw(score_tables(found, file.stem), form))


def _taught(probe: Probe) -> tuple[Study, Path]:
    """The shipped study of a lesson, on the given model."""
    if probe.name != "density" or probe.tuned or probe.knowledge or probe.corpus or probe.test:
        raise UserError("--teach: give the measure density and one model, and no data: proxytune probe density MODEL --teach")
    study, folder = load_study(STUDIES / "taught.yaml")
    changes = {"study": f"taught-{Path(str(probe.target)).name}", "models": {"base": absolute(str(probe.target))}, "threads": probe.threads}
    return study_of("probe", study.model_dump() | changes), folder


def _measures(name: str) -> tuple[str, ...]:
    """The measure, preceded by those that it is built on. Raises `UserError` if there is no measure of that name."""
    known = measures()
    if name not in known:
        raise UserError(f"probe: there is no measure '{name}'; there are {', '.join(sorted(known))}")
    return (*known[name].built_on, name)
