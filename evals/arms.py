"""Arms: the recipes that end in mixtures. Tunes what has to be tuned, once, and says which models to load together."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from transformers import TrainerCallback

from evals.material import Material
from evals.measures import Probe
from evals.study import Direct, Expert, Proxy, Study, proxy_name
from finetune.recipe import Tuning
from finetune.tuning import tune
from proxytune.adapters import is_adapter
from proxytune.content import content_key
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

    States belong to weights: a proxied base has the base's own and an expert is another, smaller model, so density is
    measured of the base and of the direct arms, each loaded alone (its untrained twin takes as much memory again).
    """
    base = Weights(material.base, field="models.base")
    alone: dict[str, Mixture] = {study.base_arm: {"base": 1.0}}
    before = alone
    experts = [name for name, arm in study.arms.items() if isinstance(arm, Expert)]
    for name in experts:
        assert material.small is not None
        members = {"base": base, "expert": _expert(study, name, material, folder, seed, out, watcher)}
        members["antiexpert"] = Weights(material.small, field="models.small")
        yield Ensemble(members, before | {name: {"expert": 1.0}} | _proxies(study, name), ("generate", "choose"))
        before = {}
    if not experts:
        yield Ensemble({"base": base}, alone, ("generate", "choose"))
    yield Ensemble({"base": base}, alone, ("density",))
    for name, arm in study.arms.items():
        if isinstance(arm, Direct):
            for label, (_, tuning) in arm.points(name).items():
                weights = _tuned(base, tuning, label, material, seed, out, watcher)
                yield Ensemble({"tuned": weights}, {label: {"tuned": 1.0}}, ("generate", "choose", "density"))
            proxies = _proxies(study, name)
            if proxies:
                yield Ensemble({"base": base, "expert": weights, "antiexpert": base}, proxies, ("generate", "choose"))


def _proxies(study: Study, expert: str) -> dict[str, Mixture]:
    return {
        proxy_name(name, alpha): proxy_tuning(alpha)
        for name, arm in study.arms.items()
        if isinstance(arm, Proxy) and study.expert_of(name) == expert
        for alpha in arm.alpha
    }


def _expert(study: Study, name: str, material: Material, folder: Path, seed: int, out: Path, watcher: TrainerCallback) -> Weights:
    """The expert's weights: tuned here, or given."""
    arm = study.arms[name]
    assert isinstance(arm, Expert) and material.small is not None
    small = Weights(material.small, field="models.small")
    if arm.tuning is not None:
        return _tuned(small, arm.tuning, name, material, seed, out, watcher)
    assert arm.path is not None
    given = folder / arm.path if (folder / arm.path).exists() else Path(arm.path).expanduser()
    if is_adapter(given):
        return replace(small, adapter=given, field=f"arms.{name}.path")
    return Weights(str(given) if given.exists() else arm.path, field=f"arms.{name}.path")


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
    if not (result / "tuning.json").exists():
        try:
            tune(
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
                watcher=watcher,
            )
        except UserError as error:
            raise UserError(f"arms.{name}.tuning, {error}") from error
    return replace(start, adapter=result) if tuning.method == "lora" else Weights(str(result), field=f"arms.{name}")


@cache
def _fingerprint(path: str, field: str) -> str:
    """Of a start, which does not change while a study runs."""
    return load_member(path, field=field).fingerprint


def tuning_summary(weights: Weights) -> dict[str, object] | None:
    """The card of a tuned member: what `tune` reported. None for weights that we did not tune."""
    card = (weights.adapter or Path(weights.path)) / "tuning.json"
    return json.loads(card.read_text()) if card.exists() else None
