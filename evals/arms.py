"""Arms: which members are loaded together, which mixtures of them are arms, and how a tuned member is made or found."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from transformers import TrainerCallback
from transformers.utils import CONFIG_NAME, cached_file

from evals.data import StudyData
from evals.selection import Choices, recorded, strength
from evals.study import Study, Tuned, expanded
from finetune.recipe import Tuning, TuningRun
from finetune.tuning import TuningReport, tune
from proxytune.adapters import is_adapter
from proxytune.content import content_key
from proxytune.digests import is_whole
from proxytune.errors import UserError
from proxytune.member import Weights, load_member, load_tokenizer
from proxytune.mixture import Mixture, proxy_tuning
from proxytune.vocabulary import check_same_vocabulary


@dataclass(frozen=True)
class Group:
    """Arms that are read from one set of loaded members: the base alone, or a tuned model and the proxies whose expert it is.

    `label` is the arm of the tuned model itself (for the base alone, the base's arm); `arm` is its entry in the study.
    """

    kind: Literal["base", "expert", "direct"]
    label: str
    arm: str


def groups(study: Study) -> list[Group]:
    """The groups of a study. Every arm is in exactly one."""
    found = [Group("base", study.base_arm, study.base_arm)]
    for kind in ("expert", "direct"):
        found += [Group(kind, label, setting.arm) for label, setting in study.rows.items() if setting.kind == kind]
    return found


def selected_strengths(study: Study, group: Group) -> bool:
    """Whether a proxy with `select` may be in the group: which one its expert is, or with which strength, is only known by its selection."""
    selecting = [name for name in study.selecting if study.arms[name].kind == "proxy"]
    return any(study.expert_of(name) == group.arm for name in selecting)


def mixtures_of(study: Study, group: Group, choices: Choices) -> dict[str, Mixture]:
    """The mixture of every arm of the group, over the members that `members_of` returns. `choices`: what was selected in this run."""
    if group.kind == "base":
        return {group.label: {"base": 1.0}}
    proxies = {}
    for label, setting in study.rows.items():
        if setting.kind == "proxy" and study.expert_of(setting.arm) == group.arm:
            expert, alpha = strength(study, label, choices)
            if expert == group.label:
                proxies[label] = proxy_tuning(alpha)
    return {group.label: {"expert": 1.0}, **proxies}


def members_of(group: Group, mixtures: Mapping[str, Mixture], data: StudyData, tuned: Weights | None, beside_base: bool) -> dict[str, Weights]:
    """The members to load for the group's `mixtures`. The first member's tokenizer is used for all: a tuned base without proxies comes first, as it
    would be served.

    `beside_base`: load the base even if the tuned base is the group's only arm.
    """
    base = Weights(data.base, field="models.base")
    if tuned is None:
        return {"base": base}
    if group.kind == "expert":
        assert data.small is not None
        return {"base": base, "expert": tuned, "antiexpert": Weights(data.small, field="models.small")}
    if len(mixtures) > 1:
        return {"base": base, "expert": tuned, "antiexpert": base}
    return {"expert": tuned} | ({"base": base} if beside_base else {})


def check_vocabularies(data: StudyData) -> None:
    """Raises `UserError`, before anything is tuned, if base and small model have different vocabularies."""
    tokenizers = {"models.base": load_tokenizer(data.base, "models.base")}
    if data.small is not None:
        tokenizers["models.small"] = load_tokenizer(data.small, "models.small")
    check_same_vocabulary(tokenizers)


def tunings(study: Study) -> Iterator[tuple[Group, Tuning | None]]:
    """The groups whose model we tune, each with its recipe; None if the setting has yet to be selected."""
    choices = recorded(study) or Choices()
    for group in groups(study):
        arm = study.arms[group.arm]
        if isinstance(arm, Tuned) and arm.tuning is not None:
            if group.arm in choices:
                yield group, choices[group.arm].tuning
            else:
                yield group, None if arm.select is not None else arm.settings(group.arm)[group.label][1].tuning


def given_weights(study: Study, group: Group, data: StudyData, folder: Path) -> Weights:
    """A model that was tuned elsewhere: a folder beside the study file or elsewhere, a hub name, or a LoRA adapter on the model it was tuned from."""
    arm = study.arms[group.arm]
    assert isinstance(arm, Tuned)
    path, field = str(arm.path), f"arms.{group.arm}.path"
    given = folder / path if (folder / path).exists() else expanded(path)
    if is_adapter(given):
        return replace(start_of(group, data), adapter=given, field=field)
    return Weights(str(given) if given.exists() else path, field=field)


def tuned_folder(group: Group, tuning: Tuning, data: StudyData, seed: int, out: Path) -> Path:
    """The folder of the tuned model. Its name is a hash of everything that decides the model (weights, data, settings and seed)."""
    start = start_of(group, data)
    key = content_key(
        start=_fingerprint(start.path, start.field),
        base=None if tuning.consistent is None else _fingerprint(data.base, "models.base"),
        items=[item.model_dump() for item in data.train],
        tuning=tuning.model_dump(),
        prompt=data.prompt,
        ending=data.ending,
        seed=seed,
    )
    return out / "checkpoints" / key


def tuned_weights(group: Group, tuning: Tuning, data: StudyData, seed: int, out: Path, watcher: TrainerCallback) -> Weights:
    """The tuned model: from an earlier run if it is complete there, otherwise tuned now. Waits for a process that is tuning the same model."""
    start, result = start_of(group, data), tuned_folder(group, tuning, data, seed, out)
    with FileLock(result.parent / f".{result.name}.lock"):
        if not is_whole(result):
            try:
                base = None if tuning.consistent is None else data.base
                asked = {"prompt": data.prompt, "ending": data.ending, "seed": seed}
                run = TuningRun(start.path, data.train, tuning, **asked, out=result, field=start.field, base=base, states=out / "states")  # type: ignore[arg-type]
                tune(run, watcher)
            except UserError as error:
                raise UserError(f"arms.{group.label}.tuning, {error}") from error
    return tuned_as(group, tuning, data, result)


def tuned_as(group: Group, tuning: Tuning, data: StudyData, folder: Path) -> Weights:
    """The weights of a tuned model in its folder: a whole model, or an adapter on the model it was tuned from."""
    return replace(start_of(group, data), adapter=folder) if tuning.method == "lora" else Weights(str(folder), field=f"arms.{group.label}")


def start_of(group: Group, data: StudyData) -> Weights:
    """The model that the group's model is tuned from."""
    return Weights(str(data.small), field="models.small") if group.kind == "expert" else Weights(data.base, field="models.base")


def _fingerprint(path: str, field: str) -> str:
    """The fingerprint of a model that is tuned: computed once, and again if one of its files has changed."""
    return _fingerprint_of(path, field, _files_of(path))


@cache
def _fingerprint_of(path: str, field: str, files: tuple[tuple[object, ...], ...]) -> str:
    return load_member(path, field=field).fingerprint


def _files_of(path: str) -> tuple[tuple[object, ...], ...]:
    """The files of a local folder or of a hub snapshot, with inode, size and times: a change of a file changes this value."""
    folder = Path(path) if Path(path).is_dir() else Path(str(cached_file(path, CONFIG_NAME))).parent
    files = [(file, file.stat()) for file in sorted(folder.iterdir())]
    return tuple((str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in files)


def tuning_summary(weights: Weights) -> dict[str, Any] | None:
    """The card of a tuned member: what `tune` reported. None for weights that we did not tune. Raises `UserError` for an invalid card."""
    file = (weights.adapter or Path(weights.path)) / "tuning.json"
    if not file.exists():
        return None
    try:
        card: dict[str, Any] = json.loads(file.read_bytes())
        TuningReport(**card["report"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(
            f"{weights.field}: '{file}' is no card of a tuning ({type(error).__name__}: {error}); remove it, and its costs are left out"
        ) from error
    return card
