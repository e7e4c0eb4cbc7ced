"""Arms: the recipes that end in mixtures. Tunes what has to be tuned, once, and says which models to load together."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import TrainerCallback

from evals.material import Material
from evals.measures import Probe
from evals.study import Direct, Expert, Proxy, Study
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


def proxy_name(name: str, alpha: float) -> str:
    """`proxy@0.5`: how a proxy arm of strength alpha is called in every table."""
    return f"{name}@{alpha:g}"


def arm_names(study: Study) -> list[str]:
    """All arms in the study's order, one for each alpha."""
    return [
        label
        for name, arm in study.arms.items()
        for label in ([proxy_name(name, alpha) for alpha in arm.alpha] if isinstance(arm, Proxy) else [name])
    ]


def check_vocabularies(material: Material) -> None:
    """Raises `UserError` before anything is tuned where base and small model speak of different tokens."""
    tokenizers = {"models.base": load_tokenizer(material.base, "models.base")}
    if material.small is not None:
        tokenizers["models.small"] = load_tokenizer(material.small, "models.small")
    check_same_vocabulary(tokenizers)


def ensembles(study: Study, material: Material, folder: Path, seed: int, checkpoints: Path, watcher: TrainerCallback) -> Iterator[Ensemble]:
    """The ensembles that between them hold every arm, each tuned when its turn comes. `folder` is the study file's.

    States belong to weights: a proxied base has the base's own and an expert is another, smaller model, so density is
    measured of the base and of the direct arms, each loaded alone (its untrained twin takes as much memory again).
    """
    members = {"base": Weights(material.base, field="models.base")}
    mixtures: dict[str, Mixture] = {study.base_arm: {"base": 1.0}}
    for name, arm in study.arms.items():
        if isinstance(arm, Expert):
            assert material.small is not None
            members["expert"] = _expert(arm, name, material, folder, seed, checkpoints, watcher)
            members["antiexpert"] = Weights(material.small, field="models.small")
            mixtures[name] = {"expert": 1.0}
    for name, arm in study.arms.items():
        if isinstance(arm, Proxy):
            mixtures |= {proxy_name(name, alpha): proxy_tuning(alpha) for alpha in arm.alpha}
    yield Ensemble(members, mixtures, ("generate", "choose"))
    yield Ensemble({"base": members["base"]}, {study.base_arm: {"base": 1.0}}, ("density",))
    for name, arm in study.arms.items():
        if isinstance(arm, Direct):
            weights = _tuned(Weights(material.base, field="models.base"), arm.tuning, name, material, seed, checkpoints, watcher)
            yield Ensemble({name: weights}, {name: {name: 1.0}}, ("generate", "choose", "density"))


def _expert(arm: Expert, name: str, material: Material, folder: Path, seed: int, checkpoints: Path, watcher: TrainerCallback) -> Weights:
    assert material.small is not None
    small = Weights(material.small, field="models.small")
    if arm.tuning is not None:
        return _tuned(small, arm.tuning, name, material, seed, checkpoints, watcher)
    assert arm.path is not None
    given = folder / arm.path if (folder / arm.path).exists() else Path(arm.path).expanduser()
    if is_adapter(given):
        return replace(small, adapter=given, field=f"arms.{name}.path")
    return Weights(str(given) if given.exists() else arm.path, field=f"arms.{name}.path")


def _tuned(start: Weights, tuning: Tuning, name: str, material: Material, seed: int, checkpoints: Path, watcher: TrainerCallback) -> Weights:
    """The tuned checkpoint, from an earlier run if all that decides it is the same: weights, data, settings and seed."""
    fingerprint = load_member(start.path, field=start.field).fingerprint
    items = [item.model_dump() for item in material.train]
    key = content_key(start=fingerprint, items=items, tuning=tuning.model_dump(), prompt=material.prompt, ending=material.ending, seed=seed)
    out = checkpoints / key
    if not (out / "tuning.json").exists():
        try:
            tune(
                start.path,
                material.train,
                tuning,
                prompt=material.prompt,
                ending=material.ending,
                seed=seed,
                out=out,
                field=start.field,
                watcher=watcher,
            )
        except UserError as error:
            raise UserError(f"arms.{name}.tuning, {error}") from error
    return replace(start, adapter=out) if tuning.method == "lora" else Weights(str(out), field=f"arms.{name}")


def tuning_summary(weights: Weights) -> dict[str, object] | None:
    """The card of a tuned member: what `tune` reported. None for weights that we did not tune."""
    card = (weights.adapter or Path(weights.path)) / "tuning.json"
    return json.loads(card.read_text()) if card.exists() else None
