"""Arms: which members are loaded together, which mixtures of them are arms, and how a tuned member is made or found."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import CONFIG_NAME, cached_file

from evals.data import StudyData
from evals.kinds import Direct, LogitBias, Swept, Tuned
from evals.selection import Choices, recorded, strength
from evals.study import Study, expanded
from finetune.checkpoints import STEPS
from finetune.encoding import continuation_ids
from finetune.logit_bias import fit_logit_bias, read_bias
from finetune.recipe import BiasTuning, Tuning, TuningRun
from finetune.tuning import TuningReport, tune
from proxytune.adapters import is_adapter
from proxytune.bias import Bias
from proxytune.content import content_key
from proxytune.digests import is_whole
from proxytune.errors import UserError
from proxytune.member import Member, Weights, load_member, load_tokenizer
from proxytune.mixture import Mixture, Rule, proxy_tuning
from proxytune.vocabulary import check_same_vocabulary


@dataclass(frozen=True)
class Group:
    """Arms that are read from one set of loaded members: the base alone, without or with a bias, or a tuned model and the proxies whose expert it is.

    `label` is the arm of the tuned model itself (for the base alone, the base's arm); `arm` is its entry in the study.
    """

    kind: Literal["base", "expert", "direct", "bias"]
    label: str
    arm: str


def groups(study: Study) -> list[Group]:
    """The groups of a study. Every arm is in exactly one."""
    found = [Group("base", study.base_arm, study.base_arm)]
    kinds: tuple[tuple[str, Literal["expert", "direct", "bias"]], ...] = (("expert", "expert"), ("direct", "direct"), ("logit_bias", "bias"))
    for kind, of_group in kinds:
        found += [Group(of_group, label, setting.arm) for label, setting in study.rows.items() if setting.kind == kind]
    return found


def selected_strengths(study: Study, group: Group) -> bool:
    """Whether a proxy with `select` may be in the group: which one its expert is, or with which strength, is only known by its selection."""
    selecting = [name for name in study.selecting if study.arms[name].kind == "proxy"]
    return any(study.expert_of(name) == group.arm for name in selecting)


def mixtures_of(study: Study, group: Group, choices: Choices, bias: Bias | None = None) -> dict[str, Mixture]:
    """The mixture of every arm of the group, over the members that `members_of` returns.

    `choices`: what was selected in this run. `bias` is what `bias_for` returns.
    """
    if group.kind in ("base", "bias"):
        return {group.label: {"base": 1.0} if bias is None else Rule({"base": 1.0}, bias=bias)}
    proxies: dict[str, Mixture] = {}
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
    if tuned is None or group.kind == "bias":
        return {"base": base}
    if group.kind == "expert":
        assert data.small is not None
        return {"base": base, "expert": tuned, "antiexpert": Weights(data.small, field="models.small")}
    if len(mixtures) > 1:
        return {"base": base, "expert": tuned, "antiexpert": base}
    return {"expert": tuned} | ({"base": base} if beside_base else {})


def bias_for(study: Study, group: Group, base: Member, fitted: Weights | None) -> Bias | None:
    """The bias of the group's arm: read from where it was fitted, or one that forbids the arm's words. None for an arm without a bias."""
    arm = study.arms[group.arm]
    if not isinstance(arm, LogitBias):
        return None
    if fitted is not None:
        return read_bias(fitted.path, fitted.field)
    return Bias.banning(_banned_tokens(base.tokenizer, arm.banned or (), f"arms.{group.arm}.banned"), base.rows)


def _banned_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], field: str) -> list[int]:
    """The token of every word as it is after a space. Raises `UserError` for a word that is not exactly one token."""
    found = []
    for word in words:
        ids = continuation_ids(tokenizer, word)
        if len(ids) > 1:
            parts = " ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
            raise UserError(f"{field}: {word!r} is {len(ids)} tokens of the base ({parts}); give words of one token")
        if tokenizer.decode(ids).strip() != word:
            raise UserError(f"{field}: the base's vocabulary has no token for {word!r} (it reads {tokenizer.decode(ids)!r}); give a word that it has")
        found += ids
    return found


def check_banned(study: Study, data: StudyData) -> None:
    """Raises `UserError`, before anything is tuned, for a banned word that is not exactly one token of the base."""
    for name, arm in study.arms.items():
        if isinstance(arm, LogitBias) and arm.banned is not None:
            _banned_tokens(load_tokenizer(data.base, "models.base"), arm.banned, f"arms.{name}.banned")


def check_vocabularies(data: StudyData) -> None:
    """Raises `UserError`, before anything is tuned, if base and small model have different vocabularies."""
    tokenizers = {"models.base": load_tokenizer(data.base, "models.base")}
    if data.small is not None:
        tokenizers["models.small"] = load_tokenizer(data.small, "models.small")
    check_same_vocabulary(tokenizers)


def tunings(study: Study) -> Iterator[tuple[Group, Tuning | BiasTuning | None]]:
    """The groups whose model or bias we tune, each with its recipe; None if the setting has yet to be selected."""
    choices = recorded(study) or Choices()
    for group in groups(study):
        arm = study.arms[group.arm]
        if isinstance(arm, Swept) and arm.tuning is not None:
            if group.arm in choices:
                yield group, choices[group.arm].tuning
            else:
                yield group, None if arm.select is not None else arm.settings(group.arm)[group.label][1].tuning


def given_weights(study: Study, group: Group, data: StudyData, folder: Path) -> Weights:
    """A model that was tuned elsewhere: a folder beside the study file or elsewhere, a hub name, or a LoRA adapter on the model it was tuned from.

    In an embedded world a folder in the family's folder comes first: `checkpoints/step-100` is the base as it was after 100 steps of pretraining.
    """
    arm = study.arms[group.arm]
    assert isinstance(arm, Tuned)
    path, field = str(arm.path), f"arms.{group.arm}.path"
    places = [*([Path(data.base).parent] if study.worlds else []), folder]
    given = next((place / path for place in places if (place / path).exists()), expanded(path))
    if is_adapter(given):
        return replace(start_of(group, data), adapter=given, field=field)
    return Weights(str(given) if given.exists() else path, field=field)


def tuned_folder(group: Group, tuning: Tuning | BiasTuning, data: StudyData, seed: int, out: Path) -> Path:
    """The folder of the tuned model or bias. Its name is a hash of everything that decides it (weights, data, settings, and a model's seed)."""
    start = start_of(group, data)
    consistent = isinstance(tuning, Tuning) and tuning.consistent is not None
    key = content_key(
        start=_fingerprint(start.path, start.field),
        base=_fingerprint(data.base, "models.base") if consistent else None,
        items=[item.model_dump() for item in data.train],
        tuning=tuning.model_dump(),
        prompt=data.prompt,
        ending=data.ending,
        seed=seed if isinstance(tuning, Tuning) else None,
    )
    return out / "checkpoints" / key


def tuned_weights(group: Group, tuning: Tuning | BiasTuning, data: StudyData, seed: int, out: Path, watcher: TrainerCallback) -> Weights:
    """The tuned model or bias: from an earlier run if it is complete there, otherwise tuned now. Waits for a process that is tuning the same."""
    start, result = start_of(group, data), tuned_folder(group, tuning, data, seed, out)
    with FileLock(result.parent / f".{result.name}.lock"):
        if not is_whole(result):
            try:
                asked: dict[str, Any] = {"prompt": data.prompt, "ending": data.ending, "out": result, "field": start.field, "states": out / "states"}
                if isinstance(tuning, BiasTuning):
                    fit_logit_bias(start.path, data.train, tuning, **asked)
                else:
                    base = None if tuning.consistent is None else data.base
                    tune(TuningRun(start.path, data.train, tuning, **asked, seed=seed, base=base), watcher)
            except UserError as error:
                raise UserError(f"arms.{group.label}.tuning, {error}") from error
    return tuned_as(group, tuning, data, result)


def tuned_as(group: Group, tuning: Tuning | BiasTuning, data: StudyData, folder: Path) -> Weights:
    """What was tuned, in its folder: a whole model, an adapter on the model it was tuned from, or a bias."""
    adapted = isinstance(tuning, Tuning) and tuning.method == "lora"
    return replace(start_of(group, data), adapter=folder) if adapted else Weights(str(folder), field=f"arms.{group.label}")


def start_of(group: Group, data: StudyData) -> Weights:
    """The model that the group's model is tuned from."""
    return Weights(str(data.small), field="models.small") if group.kind == "expert" else Weights(data.base, field="models.base")


def at_step(study: Study, group: Group, tuned: Weights | None) -> Weights | None:
    """The group's model as its arm wants it: tuned to the end, or as it was after a step that the tuning kept."""
    arm = study.arms[group.arm]
    if tuned is None or not isinstance(arm, Direct) or arm.step is None:
        return tuned
    folder = (tuned.adapter or Path(tuned.path)) / STEPS / f"step-{arm.step}"
    return replace(tuned, adapter=folder) if tuned.adapter is not None else replace(tuned, path=str(folder))


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
    """The card of a tuned member or a fitted bias: what tuning reported. None for what we did not tune. Raises `UserError` for an invalid card."""
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
