"""Runs a study: tunes its arms, measures them, keeps a record of each, and draws the table from the records.

Stop it at any time and start it again: what is recorded or tuned is not done again, and the end is the same.
"""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evals.arms import Ensemble, check_vocabularies, ensembles, tuned_bases, tuning_summary
from evals.costs import serving_cost, tuning_cost, with_trials
from evals.inside import measure_inside
from evals.material import Material, material_for
from evals.measures import Measurement, measure, measurements, workload
from evals.progress import Display
from evals.records import Record, read_record, write_record
from evals.selection import choose_dials
from evals.study import Study
from finetune.encoding import prompt_ids
from proxytune.content import content_key
from proxytune.errors import UserError
from proxytune.member import Member, load_members
from proxytune.mixture import Mixture, active
from proxytune.modeling import ProxyTunedForCausalLM


def run_study(study: Study, folder: Path, out: Path, display: Display) -> list[Record]:
    """Measures every arm of every seed; returns the records in the study's order.

    Writes `out`/records, `out`/checkpoints, `out`/worlds and `out`/study.json. Raises `UserError` where `out` cannot be
    written, and under a launcher of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("launcher: a study runs in one process; start it without torchrun, and tune large arms beforehand with proxytune tune")
    torch.set_num_threads(study.threads)
    try:
        for name in ("records", "checkpoints"):
            (out / name).mkdir(parents=True, exist_ok=True)
        (out / "study.json").write_text(study.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise UserError(f"out: '{out}' cannot be written ({error}); choose another folder with --out") from error
    records: list[Record] = []
    for seed in study.seeds:
        material = material_for(study, folder, seed, out / "worlds", display, display.say)
        check_vocabularies(material)
        measured = partial(_measure_seed, folder=folder, seed=seed, out=out, display=display)
        decided, choices = choose_dials(study, material, seed, measured)
        for name, choice in choices.items():
            scores = ", ".join(f"{label} {score:.3f}" for label, score in choice.scores.items())
            display.say(f"seed {seed} · {name}: chose {choice.label} by validation ({scores})")
        for record in measured(decided, material):
            trials = choices[record.arm].trials if record.arm in choices else []
            records.append(replace(record, cost=with_trials(record.cost, trials)) if trials and record.cost else record)
    order = {arm: position for position, arm in enumerate(study.points)}
    return sorted(records, key=lambda record: (record.measurement, order[record.arm], record.seed))


def _measure_seed(study: Study, material: Material, *, folder: Path, seed: int, out: Path, display: Display) -> list[Record]:
    asked = measurements(study, material)
    records = []
    for ensemble in ensembles(study, material, folder, seed, out, display):
        wanted = [measurement for measurement in asked if measurement.probe in ensemble.probes]
        if wanted:
            records += _measure_ensemble(study, ensemble, wanted, seed, out, display)
    records += measure_inside(study, material, tuned_bases(study, material, folder, seed, out, display), seed, out, display)
    return records


def _measure_ensemble(study: Study, ensemble: Ensemble, asked: list[Measurement], seed: int, out: Path, display: Display) -> list[Record]:
    with display.bar(f"seed {seed} · loading {', '.join(ensemble.members)}", None):
        members = load_members(ensemble.members, prepacked=True)
    _say_what_was_tuned(ensemble, seed, display)
    model = ProxyTunedForCausalLM(members, next(iter(ensemble.mixtures.values())))
    costs = {arm: _cost(ensemble, members, mixture) for arm, mixture in ensemble.mixtures.items()}
    records = []
    for measurement in asked:
        arms = list(ensemble.mixtures)
        keys = {arm: _key(members, ensemble, arm, measurement, seed) for arm in arms}
        done = {arm: read_record(out / "records", key) for arm, key in keys.items()}
        missing = [arm for arm, record in done.items() if record is None]
        if missing:
            if seed == study.seeds[0] and study.base_arm in missing:
                _say_first_prompt(measurement, members["base"], display)
            title = f"seed {seed} · {measurement.name} · {', '.join(missing)}"
            mixtures = {arm: ensemble.mixtures[arm] for arm in missing}
            tokenizer = next(iter(members.values())).tokenizer
            with display.bar(title, workload(measurement, len(missing))) as progress:
                frames = measure(measurement, model, tokenizer, mixtures, study, progress)
            for arm, frame in frames.items():
                write_record(out / "records", keys[arm], frame, _provenance(study, ensemble, members, arm, measurement, seed))
                done[arm] = (frame, {})
        for arm in arms:
            record = done[arm]
            assert record is not None
            records.append(Record(arm, measurement.name, seed, measurement.protocol, record[0], costs[arm]))
            display.say(_summary(records[-1], reused=arm not in missing))
    return records


def _key(members: dict[str, Member], ensemble: Ensemble, arm: str, measurement: Measurement, seed: int) -> str:
    # Members with their coefficients in the mixture's order, without the names they go by; and the first of those loaded, whose tokenizer
    # and generation configuration are the mixture's even where it has no part in it.
    weighted = [[members[name].fingerprint, coefficient] for name, coefficient in active(ensemble.mixtures[arm]).items()]
    interface = next(iter(members.values())).interface
    return content_key(mixture=weighted, interface=interface, protocol=measurement.protocol, seed=seed)


def _cost(ensemble: Ensemble, members: dict[str, Member], mixture: Mixture) -> dict[str, Any]:
    names = list(active(mixture))
    cards = [card for name in names if (card := tuning_summary(ensemble.members[name])) is not None]
    return tuning_cost(cards) | serving_cost(members, names)


def _provenance(study: Study, ensemble: Ensemble, members: dict[str, Member], arm: str, measurement: Measurement, seed: int) -> dict[str, Any]:
    names = active(ensemble.mixtures[arm])
    return {
        "study": study.study,
        "arm": arm,
        "seed": seed,
        "measurement": measurement.name,
        "protocol": measurement.protocol,
        "mixture": names,
        "weights": {name: members[name].fingerprint for name in names},
        "tuning": {name: tuning_summary(ensemble.members[name]) for name in names},
        "first_prompt": measurement.prompts[0],
        "threads": study.threads,
    }


def _say_first_prompt(measurement: Measurement, base: Member, display: Display) -> None:
    prompt = measurement.prompts[0]
    display.say(
        f"{measurement.name}: first prompt {json.dumps(prompt)} = {prompt_ids(base.tokenizer, prompt)}, answer {measurement.items[0].answer!r}"
    )


def _say_what_was_tuned(ensemble: Ensemble, seed: int, display: Display) -> None:
    for name, weights in ensemble.members.items():
        card: Any = tuning_summary(weights)
        if card is not None:
            report = card["report"]
            display.say(
                f"seed {seed} · {', '.join(ensemble.mixtures)} · {name}: {report['examples']} examples, {report['steps']} steps, "
                f"{report['parameters']:,} parameters tuned, "
                f"{report['trained_share']:.0%} of {report['tokens']:,} tokens trained on, {report['seconds']:.0f} s, "
                f"loss {report['losses'][0]:.2f} to {report['losses'][-1]:.2f}"
            )


def _summary(record: Record, reused: bool) -> str:
    said = f"{record.items['right'].mean():.3f} right" if "right" in record.items else f"{record.items['divergence'].mean():.4f} nats from the base"
    return f"seed {record.seed} · {record.arm} · {record.measurement}: {said} (n={len(record.items)}){' · from its record' if reused else ''}"
