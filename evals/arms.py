"""Arms: the recipes that end in mixtures. Tunes what has to be tuned, once, and says which models to load together."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import CONFIG_NAME, cached_file

from evals.material import Material
from evals.measures import Probe
from evals.study import Direct, Expert, Proxy, Study, expanded, proxy_name
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
class Ensemble:
    """Members that are loaded together, the arms that are mixtures of them, and by which probes they are measured."""

    members: dict[str, Weights]
    mixtures: dict[str, Mixture]
    probes: tuple[Probe, ...]


def check_vocabularies(material: Material) -> None:
    """Raises `UserError` before anything is tuned where base and small model speak of different tokens."""
    tokenizers = {"models.base": load_tokenizer(material.base, "models.base")}
    if material.small is not None:
        tokenizers["models.small"] = load_tokenizer(material.small, "models.small")
    check_same_vocabulary(tokenizers)


def ensembles(study: Study, material: Material, folder: Path, seed: int, out: Path, watcher: TrainerCallback) -> Iterator[Ensemble]:
    """The ensembles that between them hold every point, each tuned when its turn comes. `folder` is the study file's.

    A tuned base is loaded alone, and with the base only where their laws are compared.
    """
    base = Weights(material.base, field="models.base")
    alone: dict[str, Mixture] = {study.base_arm: {"base": 1.0}}
    before = alone
    experts = {name: arm for name, arm in study.arms.items() if isinstance(arm, Expert)}
    for name, spec in experts.items():
        assert material.small is not None
        small = Weights(material.small, field="models.small")
        if spec.tuning is None:
            expert = _given(small, str(spec.path), f"arms.{name}.path", folder)
        else:
            expert = _tuned(small, spec.tuning, name, material, seed, out, watcher)
        members = {"base": base, "expert": expert, "antiexpert": small}
        yield Ensemble(members, before | {name: {"expert": 1.0}} | _proxies(study, name), ("generate", "choose", "law"))
        before = {}
    if not experts:
        yield Ensemble({"base": base}, alone, ("generate", "choose", "law"))
    for name, arm in study.arms.items():
        if isinstance(arm, Direct):
            for label, weights in _points(name, arm, material, folder, seed, out, watcher):
                yield Ensemble({"tuned": weights}, {label: {"tuned": 1.0}}, ("generate", "choose"))
                yield Ensemble({"base": base, "tuned": weights}, {label: {"tuned": 1.0}}, ("law",))
            proxies = _proxies(study, name)
            if proxies:
                yield Ensemble({"base": base, "expert": weights, "antiexpert": base}, proxies, ("generate", "choose", "law"))


def tuned_bases(study: Study, material: Material, folder: Path, seed: int, out: Path, watcher: TrainerCallback) -> Iterator[tuple[str, Weights]]:
    """Label and weights of every point that is the base itself tuned; tuned when its turn comes, if it was not before."""
    for name, arm in study.arms.items():
        if isinstance(arm, Direct):
            yield from _points(name, arm, material, folder, seed, out, watcher)


def _points(
    name: str, arm: Direct, material: Material, folder: Path, seed: int, out: Path, watcher: TrainerCallback
) -> Iterator[tuple[str, Weights]]:
    base = Weights(material.base, field="models.base")
    for label, (_, tuning) in arm.points(name).items():
        if tuning is None:
            yield label, _given(base, str(arm.path), f"arms.{name}.path", folder)
        else:
            yield label, _tuned(base, tuning, label, material, seed, out, watcher)


def _proxies(study: Study, expert: str) -> dict[str, Mixture]:
    return {
        proxy_name(name, alpha): proxy_tuning(alpha)
        for name, arm in study.arms.items()
        if isinstance(arm, Proxy) and study.expert_of(name) == expert
        for alpha in arm.alpha
    }


def _given(start: Weights, path: str, field: str, folder: Path) -> Weights:
    """What was tuned beforehand: a folder beside the study file or elsewhere, a hub name, or a LoRA adapter on the start."""
    given = folder / path if (folder / path).exists() else expanded(path)
    if is_adapter(given):
        return replace(start, adapter=given, field=field)
    return Weights(str(given) if given.exists() else path, field=field)


def _tuned(start: Weights, tuning: Tuning, name: str, material: Material, seed: int, out: Path, watcher: TrainerCallback) -> Weights:
    """The tuned checkpoint, from an earlier run if all that decides it is the same: weights, data, settings and seed."""
    base = None if tuning.consistent is None else material.base
    key = content_key(
        start=_fingerprint(start.path, start.field),
        base=None if base is None else _fingerprint(base, "models.base"),
        items=[item.model_dump() for item in material.train],
        tuning=tuning.model_dump(),
        prompt=material.prompt,
        ending=material.ending,
        seed=seed,
    )
    result = out / "checkpoints" / key
    if not is_whole(result):
        try:
            run = TuningRun(
                start.path,
                material.train,
                tuning,
                prompt=material.prompt,
                ending=material.ending,
                seed=seed,
                out=result,
                field=start.field,
                base=base,
                states=out / "states",
            )
            tune(run, watcher)
        except UserError as error:
            raise UserError(f"arms.{name}.tuning, {error}") from error
    return replace(start, adapter=result) if tuning.method == "lora" else Weights(str(result), field=f"arms.{name}")


def _fingerprint(path: str, field: str) -> str:
    """Of a start: taken once, and again when one of its files was written."""
    return _fingerprint_of(path, field, _files_of(path))


@cache
def _fingerprint_of(path: str, field: str, files: tuple[tuple[object, ...], ...]) -> str:
    return load_member(path, field=field).fingerprint


def _files_of(path: str) -> tuple[tuple[object, ...], ...]:
    """The files of a local folder, or of a hub's snapshot, as the file system tells them apart."""
    folder = Path(path) if Path(path).is_dir() else Path(str(cached_file(path, CONFIG_NAME))).parent
    files = [(file, file.stat()) for file in sorted(folder.iterdir())]
    return tuple((str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in files)


def tuning_summary(weights: Weights) -> dict[str, Any] | None:
    """The card of a tuned member: what `tune` reported. None for weights that we did not tune. Raises `UserError` for a card that is none."""
    file = (weights.adapter or Path(weights.path)) / "tuning.json"
    if not file.exists():
        return None
    try:
        card: dict[str, Any] = json.loads(file.read_bytes())
        TuningReport(**card["report"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(
            f"{weights.field}: '{file}' is no card of a tuning ({type(error).__name__}: {error}); remove it, costs are then not told"
        ) from error
    return card
