"""Measurements of what tuning did inside: of the base, and of each tuned model of its shape beside it, as plain models.

Each group of records comes from shared passes. Only weights have an inside: a proxied base has the base's own, and an expert is
another, smaller model. Memory: both models, a copy of both's weights, and the moments of `probes/internals/moments.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from evals.material import Material
from evals.measures import common_columns
from evals.progress import Display
from evals.records import Record, read_record, write_record
from evals.study import MeasureName, Study
from finetune.encoding import answer_space, continuation_ids, prompt_ids, prompt_text
from finetune.items import Item
from probes.drift import weight_drift
from probes.inside import Inside, Prompts, read_inside
from probes.internals.activations import States, last_and_subject
from probes.internals.blocks import BLOCKS, blocks_of, check_same_shape, put, random_delta, weights_of
from probes.internals.moments import Moments
from probes.knowledge.candidates import Known, known
from probes.knowledge.familiarity import familiarity
from probes.knowledge.readouts import Progress
from probes.lens import Lens, Reading, Translators, first_tokens, fit_translators, read_lens
from probes.linear_probe import linear_probe
from probes.nulls import gaussian_null, untrained_twin
from probes.patching import patch_subject
from probes.recoverability import Relearning, relearn
from probes.restoration import Restoration, block_label, count_evaluations, restorations, restore
from proxytune.content import content_key
from proxytune.errors import UserError
from proxytune.member import Member, Weights, load_member
from proxytune.modeling import ProxyTunedForCausalLM
from proxytune.scoring import Request, score

RANDOM_DELTAS = 3
TASK_ITEMS = 32
PLACES = ("last", "subject")
VERSION = 4


@dataclass(frozen=True)
class Pair:
    """The base, and beside it a tuned model of its shape with any adapter merged; None for the base's own point."""

    label: str
    base: Member
    tuned: Member | None

    @cached_property
    def plan(self) -> dict[str, Restoration]:
        """What is set back to the base's, part by part."""
        assert self.tuned is not None
        return restorations(self.base, self.tuned)


@dataclass(frozen=True)
class Asked:
    """What is read inside every model of a seed: knowledge statements, a part of the task, and text for the lens' translators."""

    study: Study
    material: Material
    base: Member
    seed: int

    @property
    def items(self) -> Sequence[Item]:
        return self.material.knowledge

    @cached_property
    def prompts(self) -> Prompts:
        tokenizer = self.base.tokenizer
        statements = [str(item.statement) for item in self.items]
        return Prompts(
            ids=[prompt_ids(tokenizer, statement) for statement in statements],
            positions=last_and_subject(tokenizer, self.items, statements),
            answers=[continuation_ids(tokenizer, item.answer)[0] for item in self.items],
            contrast=familiarity([_number(item.popularity) for item in self.items]).contrast,
        )

    @cached_property
    def task(self) -> list[Item]:
        """Of so many units of the task as are asked for; the same in every run."""
        return list(self.material.test[:: max(1, len(self.material.test) // TASK_ITEMS)][:TASK_ITEMS])

    @cached_property
    def texts(self) -> list[list[int]]:
        """The language that is looked at through the lens: what is tuned on, or where nothing is, the task, or else the statements.

        Not the statements if it can be helped: a translator that was fitted on them would know their last states by heart.
        """
        tokenizer, material = self.base.tokenizer, self.material
        statements = dict.fromkeys(str(item.statement) for item in self.items)
        read = [item for item in (material.train or material.test) if item.statement not in statements]
        texts = [f"{prompt_text(item, tokenizer, material.prompt)}{answer_space(material.prompt)}{item.answer}" for item in read]
        texts += [f"{item.statement} {item.answer}" for item in read if item.statement is not None]
        texts = texts or list(statements)
        order = np.random.default_rng(0).permutation(len(texts))
        window = self.base.model.config.get_text_config().max_position_embeddings
        return [prompt_ids(tokenizer, texts[place])[:window] for place in order]

    @property
    def without(self) -> set[str]:
        """Records that these items cannot give."""
        missing = set() if self.task else {"restoration/task"}
        return missing if all(item.subject is not None for item in self.items) else missing | {"patching"}

    @cached_property
    def base_known(self) -> Known:
        return self.known(self.base)

    def known(self, member: Member) -> Known:
        return known(member, self.items, batch_tokens=self.study.batch_tokens)

    def task_log_probability(self, member: Member) -> np.ndarray:
        """Mean log-probability a token (nats) of each task item's answer after its prompt."""
        prompt, tokenizer = self.material.prompt, member.tokenizer
        requests = []
        for item in self.task:
            answer = continuation_ids(tokenizer, item.answer, answer_space(prompt))
            requests.append(Request(tuple(prompt_ids(tokenizer, prompt_text(item, tokenizer, prompt))), tuple(answer)))
        model = ProxyTunedForCausalLM({"model": member}, {"model": 1.0})
        totals = score(model, requests, {"model": {"model": 1.0}}, batch_tokens=self.study.batch_tokens)["model"]
        if not totals.isfinite().all():
            item = self.task[int((~totals.isfinite()).nonzero()[0])]
            name = member.model.name_or_path or type(member.model).__name__
            raise UserError(f"task: '{name}' gives the answer of {item.question!r} no finite probability; take a model that is not broken")
        return (totals / torch.tensor([len(request.continuation) for request in requests])).numpy()

    @cached_property
    def base_translators(self) -> Translators:
        return self.translators(self.base)

    def translators(self, member: Member) -> Translators:
        return fit_translators(
            member.model, self.texts, tokens=self.study.lens_tokens, batch_size=self.study.batch_size, pad=int(member.tokenizer.pad_token_id)
        )


Frames = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Group:
    """Records that are made together: their names for the base and for a tuned model, and the function that makes them.

    `options` are what decides how, beside the items.
    """

    of_base: tuple[str, ...]
    of_tuned: tuple[str, ...]
    read: Callable[[Pair, Asked, Progress], Frames]
    workload: Callable[[Pair, Asked], int]
    options: Callable[[Asked], dict[str, Any]]

    def protocol(self, asked: Asked) -> str:
        """A hash of all that decides how models are read."""
        return content_key(version=VERSION, items=[item.model_dump() for item in asked.items], **self.options(asked))


def groups(measures: Sequence[MeasureName]) -> list[Group]:
    """What has to be read inside for the study's measures."""
    chosen = [name for name in ("density", "drift", "lens", "restoration", "recoverability") if name in measures]
    return list(dict.fromkeys(GROUPS["density" if name == "drift" else name] for name in chosen))


def _states(pair: Pair, asked: Asked, progress: Progress) -> Frames:
    """Densities, drift and their nulls."""
    batch_size = asked.study.batch_size
    frame = common_columns(asked.items).assign(length=[len(ids) for ids in asked.prompts.ids], last_token=[ids[-1] for ids in asked.prompts.ids])
    if asked.material.frequency is not None:
        frame = frame.assign(frequency=list(asked.material.frequency))
    if pair.tuned is None:
        inside = read_inside([pair.base], asked.prompts, batch_size=batch_size, progress=progress)
        twin = Member(untrained_twin(pair.base.model), pair.base.tokenizer)
        untrained = read_inside([twin], asked.prompts, batch_size=batch_size, progress=progress)
        return {"states": _wide(frame, inside), "untrained": _wide(frame, untrained), "geometry": _geometry(inside, nulls=True)}
    inside = read_inside([pair.base, pair.tuned], asked.prompts, batch_size=batch_size, progress=progress)
    base, tuned = weights_of(pair.base.model), weights_of(pair.tuned.model)
    drawn = []
    try:
        for draw in range(RANDOM_DELTAS):
            put(pair.tuned.model, random_delta(base, tuned, draw))
            drawn.append(_wide(frame, read_inside([pair.tuned], asked.prompts, batch_size=batch_size, progress=progress)).assign(draw=draw))
    finally:
        put(pair.tuned.model, tuned)
    wide = _wide(frame, inside)
    cosines = {f"cosine/{place}/{state}": inside.cosine[:, position, state] for position, place, state in _places(inside.cosine)}
    return {
        "states": pd.concat([wide, pd.DataFrame(cosines)], axis=1),
        "random": pd.concat(drawn, ignore_index=True),
        "geometry": _geometry(inside, nulls=False),
        "weights": pd.DataFrame(weight_drift(base, tuned, blocks_of(pair.tuned.model))),
    }


def _wide(frame: pd.DataFrame, inside: Inside) -> pd.DataFrame:
    """Columns metric/site/place/state; what attention and MLP of layer k add has k as its state."""
    columns = {"log_probability": inside.log_probability}
    for name, values in inside.density.items():
        shift = 1 if name.endswith(("attention", "mlp")) else 0
        columns |= {f"{name}/{place}/{state + shift}": values[:, position, state] for position, place, state in _places(values)}
    return pd.concat([frame, pd.DataFrame(columns)], axis=1)


def _places(values: np.ndarray) -> list[tuple[int, str, int]]:
    return [(position, PLACES[position], state) for position in range(values.shape[1]) for state in range(values.shape[2])]


def _geometry(inside: Inside, nulls: bool) -> pd.DataFrame:
    """A row for every state of the familiar, the unfamiliar and `both` together: `rankme` of the last model, `cka` with the first.

    With `nulls` also the Gaussian null of all items' states. Base and tuned models have the same items in these groups, since RankMe
    grows with their number.
    """
    groups = {name: inside.moments[name] for name in ("familiar", "unfamiliar")}
    groups["both"] = groups["familiar"].plus(groups["unfamiliar"])
    frame = pd.DataFrame([row for name, moments in groups.items() for row in _matrices(name, moments)])
    if nulls:
        together = groups["both"].plus(inside.moments["other"])
        for metric, entry in gaussian_null(together.mean(), together.covariance()).items():
            for name, values in entry.items():
                frame[f"gaussian_{name}/{metric}"] = frame["state"].map(dict(enumerate(values)))
    return frame


def _matrices(group: str, moments: Moments) -> list[dict[str, Any]]:
    if moments.count < 4:
        return []
    numbers = zip(moments.rankme("y").tolist(), moments.cka().tolist(), strict=True)
    return [{"group": group, "state": state, "prompts": moments.count, "rankme": rank, "cka": cka} for state, (rank, cka) in enumerate(numbers)]


def _lens(pair: Pair, asked: Asked, progress: Progress) -> Frames:
    """Each model through the plain lens, the base's and its own, and linear probes of the same states."""
    member = pair.tuned or pair.base
    lenses = {"plain": Lens(member.model), "base": Lens(pair.base.model, asked.base_translators)}
    if pair.tuned is not None:
        lenses["own"] = Lens(member.model, asked.translators(member))
    progress(1)
    pad, ids = int(member.tokenizer.pad_token_id), asked.prompts.ids
    candidates = first_tokens(member.tokenizer, asked.items)
    order, last = list[int](), list[torch.Tensor]()

    def keep(states: States) -> None:
        order.extend(states.indices)
        last.append(states.residual[:, 0].cpu())

    readings = read_lens(member.model, ids, candidates, lenses, batch_size=asked.study.batch_size, pad=pad, watch=keep)
    progress(1)
    columns: dict[str, Any] = {}
    for name, reading in readings.items():
        columns |= _reading_columns(name, reading)
    probed = linear_probe(torch.cat(last)[np.argsort(order)], asked.items, asked.seed)
    progress(1)
    if probed is not None:
        for name, values in probed._asdict().items():
            columns |= {f"linear/{name}/{state}": values[:, state] for state in range(values.shape[1])}
    explained = lenses["own" if "own" in lenses else "base"].translators
    assert explained is not None
    frame = pd.concat([common_columns(asked.items), pd.DataFrame(columns)], axis=1)
    quality = pd.DataFrame({"state": range(len(explained.explained)), "explained": explained.explained.tolist(), "ridge": explained.ridge.tolist()})
    return {"lens": frame, "translators": quality}


def _reading_columns(name: str, reading: Reading) -> dict[str, Any]:
    return {f"lens/{name}/{what}/{state}": values[:, state] for what, values in reading._asdict().items() for state in range(values.shape[1])}


def _restoration(pair: Pair, asked: Asked, progress: Progress) -> Frames:
    """What comes back when parts of the tuned model are the base's again: knowledge, at the task's cost, and by patching subjects."""
    assert pair.tuned is not None
    found = restore(pair.base, pair.tuned, pair.plan, asked.known, progress=progress)
    common = common_columns(asked.items)
    frames = [common.assign(restored=label, right=values.right, probability=values.probability) for label, values in found.items()]
    result = {"restoration": pd.concat(frames, ignore_index=True)}
    if asked.task:
        single = {label: pair.plan[label] for label in (block_label(blocks) for blocks in ((), *((block,) for block in BLOCKS), BLOCKS))}
        kept = restore(pair.base, pair.tuned, single, asked.task_log_probability, progress=progress)
        common = common_columns(asked.task)
        result["restoration/task"] = pd.concat([common.assign(restored=label, log_probability=values) for label, values in kept.items()])
    if all(item.subject is not None for item in asked.items):
        patched = patch_subject(pair.base, pair.tuned, asked.items, batch_size=asked.study.batch_size)
        states = {f"state/{state}": patched.states[:, state] for state in range(patched.states.shape[1])}
        result["patching"] = common_columns(asked.items).assign(base=patched.base, tuned=patched.tuned, **states)
    return result


def _recoverability(pair: Pair, asked: Asked, progress: Progress) -> Frames:
    """How soon knowledge returns, step by step; rows of one step are items."""
    assert pair.tuned is not None
    settings = asked.study.relearning
    how = Relearning(
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        batch_size=settings.batch_size,
        ending=asked.material.ending,
        seed=asked.seed,
        batch_tokens=asked.study.batch_tokens,
    )
    curves = relearn(pair.tuned, asked.items, asked.base_known, how, progress)
    common = common_columns(asked.items).assign(base_right=asked.base_known.right, base_probability=asked.base_known.probability)
    rows = []
    for name, curve in curves.items():
        for point, step in enumerate(curve.steps):
            these = common.iloc[curve.indices].assign(curve=name, step=step, item=curve.indices)
            rows.append(these.assign(right=curve.right[point], probability=curve.probability[point]))
    return {"recoverability": pd.concat(rows, ignore_index=True)}


def _reads(pair: Pair, asked: Asked) -> int:
    return len(asked.items) * (2 if pair.tuned is None else 1 + RANDOM_DELTAS)


def _restored(pair: Pair, asked: Asked) -> int:
    return count_evaluations(pair.plan) + (len(BLOCKS) + 2 if asked.task else 0)


GROUPS = {
    "density": Group(
        ("states", "untrained", "geometry"),
        ("states", "random", "geometry", "weights"),
        _states,
        _reads,
        lambda asked: {"frequency": asked.material.frequency, "random_deltas": RANDOM_DELTAS},
    ),
    "lens": Group(
        ("lens", "translators"),
        ("lens", "translators"),
        _lens,
        lambda pair, asked: 3,
        lambda asked: {"texts": asked.texts, "tokens": asked.study.lens_tokens},
    ),
    "restoration": Group(
        (),
        ("restoration", "restoration/task", "patching"),
        _restoration,
        _restored,
        lambda asked: {"task": [item.model_dump() for item in asked.task], "prompt": asked.material.prompt},
    ),
    "recoverability": Group(
        (),
        ("recoverability",),
        _recoverability,
        lambda pair, asked: 3 * asked.study.relearning.steps,
        lambda asked: {"relearning": asked.study.relearning.model_dump(), "ending": asked.material.ending},
    ),
}


def measure_inside(
    study: Study, material: Material, tuned: Iterable[tuple[str, Weights]], seed: int, out: Path, display: Display
) -> Iterator[Record]:
    """The records of the base and of every tuned model, those that are there already from their files.

    Raises `UserError` for a tuned model that is not of the base's shape.
    """
    wanted = groups(study.measures)
    if not wanted:
        return
    base = load_member(material.base, field="models.base")
    asked = Asked(study, material, base, seed)
    yield from _measure_pair(Pair(study.base_arm, base, None), wanted, asked, out, display)
    for label, weights in tuned:
        with display.bar(f"seed {seed} · loading {label}", None):
            member = load_member(weights.path, weights.adapter, field=weights.field, merged=True)
            check_same_shape(base, member)
        yield from _measure_pair(Pair(label, base, member), wanted, asked, out, display)


def _measure_pair(pair: Pair, wanted: Sequence[Group], asked: Asked, out: Path, display: Display) -> Iterator[Record]:
    study, seed = asked.study, asked.seed
    for group in wanted:
        names = [name for name in (group.of_base if pair.tuned is None else group.of_tuned) if name not in asked.without]
        if not names:
            continue
        protocol = group.protocol(asked)
        fingerprints = [member.fingerprint for member in (pair.base, pair.tuned) if member is not None]
        keys = {name: content_key(inside=name, weights=fingerprints, protocol=protocol, seed=seed) for name in names}
        frames = {name: record[0] for name, key in keys.items() if (record := read_record(out / "records", key)) is not None}
        reused = len(frames) == len(names)
        if not reused:
            with display.bar(f"seed {seed} · {names[0]} · {pair.label}", group.workload(pair, asked)) as progress:
                try:
                    frames = group.read(pair, asked, progress)
                except UserError as error:
                    raise UserError(f"arms.{pair.label}, {error}") from error
            provenance = {
                "study": study.study,
                "arm": pair.label,
                "seed": seed,
                "protocol": protocol,
                "weights": fingerprints,
                "threads": study.threads,
            }
            for name, frame in frames.items():
                write_record(out / "records", keys[name], frame, provenance | {"measurement": name})
        display.say(f"seed {seed} · {pair.label} · {', '.join(names)}: read{' · from its record' if reused else ''}")
        for name in names:
            yield Record(pair.label, name, seed, protocol, frames[name], {})


def _number(popularity: float | None) -> float:
    return float("nan") if popularity is None else popularity
