"""What each job does, and how a record's key is made (`keys_of`).

A job takes the outcomes of the jobs that it waits for; everything else it reads from and writes to the study's folder.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from evals.arms import at_step, bias_for, check_banned, check_vocabularies, given_weights, members_of, mixtures_of, tuned_weights, tuning_summary
from evals.data import StudyData, data_for
from evals.measures.inputs import Inputs
from evals.measures.measure import Reading
from evals.measures.novelty import NAME as NOVELTY
from evals.measures.novelty import Recalled, counted, marked
from evals.measures.registry import measures
from evals.measures.subjects import Outputs, Pair
from evals.records import has_record, read_record, write_record
from evals.running.costs import serving_cost, tuning_cost
from evals.running.plan import Job
from evals.running.progress import Display
from evals.selection import Choices, choose, recorded, score_of, trial_data, trial_study
from evals.study import Run, Study
from probes.internals.blocks import check_same_shape
from probes.world.family import build_family, find_family
from proxytune.content import content_key
from proxytune.errors import UserError
from proxytune.member import Member, Weights, load_member, load_members
from proxytune.mixture import active
from proxytune.prepacked import unpack_linear_layers


@dataclass(frozen=True)
class Place:
    """A study, the folder that its paths are relative to, and the folder of its results."""

    study: Study
    folder: Path
    out: Path

    @property
    def worlds(self) -> Path:
        return self.out / "worlds"

    @property
    def records(self) -> Path:
        return self.out / "records"


@dataclass(frozen=True)
class Entry:
    """A record's key, and what the record is of; `first` is the first prompt as text and ids, where the base is read in the first run."""

    arm: str
    frame: str
    run: Run
    protocol: str
    key: str
    first: str = ""


@dataclass(frozen=True)
class Read:
    """The outcome of a reading job: its records, and the costs of its arms, without trials."""

    entries: tuple[Entry, ...]
    costs: Mapping[str, Mapping[str, Any]]


Outcomes = Mapping[str, Any]


def perform(job: Job, place: Place, outcomes: Outcomes, display: Display) -> Any:
    """Does one job. `outcomes` are those of the jobs it waits for, by name. Raises `UserError` for mistakes that a user can fix."""
    if job.kind == "family":
        assert job.run.world is not None
        checkpoints = place.study.reads_checkpoints
        if find_family(job.run.world, job.run.seed, place.worlds, checkpoints=checkpoints) is None:
            build_family(job.run.world, job.run.seed, place.worlds, display, checkpoints=checkpoints)
        return None
    if job.kind == "select":
        choices = select_from(job, place, outcomes)
        for choice in choices.values():
            display.say(f"{job.run} · {choice}")
        return choices
    inputs = inputs_of(place, job)
    if job.kind == "tune":
        return _tune(job, place, with_classified(job, place, inputs.data, outcomes), outcomes, display)
    read = _read(job, place, inputs, outcomes, display)
    if job.kind == "classify":
        display.say(f"{job.run} · {counted(frame_of(place, read.entries[0]))}")
    return read


def inputs_of(place: Place, job: Job) -> Inputs:
    """The inputs of the job's readings; a process keeps the last inputs that it made."""
    study = trial_study(place.study) if job.trial else place.study
    return _inputs(study.model_dump_json(), place.folder, place.worlds, job.run.first, job.trial)


def forget_inputs() -> None:
    """Before a study: files may have changed since the last study of this process."""
    _inputs.cache_clear()


@lru_cache(maxsize=1)
def _inputs(study_as_json: str, folder: Path, worlds: Path, run: Run, trial: bool) -> Inputs:
    study = Study.model_validate_json(study_as_json)
    data = data_for(study, folder, run, worlds)
    check_vocabularies(data)
    check_banned(study, data)
    return Inputs(study, trial_data(study, data, run.seed) if trial else data, run.seed, folder)


def select_from(job: Job, place: Place, outcomes: Outcomes) -> Choices:
    """The settings that the validation items select in the job's run."""
    reads = [outcomes[name] for name in job.waits]
    scores = {entry.arm: score_of(frame_of(place, entry)) for read in reads for entry in read.entries}
    costs = {label: cost for read in reads for label, cost in read.costs.items()}
    return choose(place.study, scores, costs)


def choices_of(job: Job, study: Study, outcomes: Outcomes) -> Choices:
    """What was selected beforehand, or by the selection that the job waits for; empty if the job needs none."""
    found = (outcomes[name] for name in job.waits)
    return recorded(study) or next((outcome for outcome in found if isinstance(outcome, Choices)), Choices())


def frame_of(place: Place, entry: Entry) -> Any:
    """The frame of a record that a job has made. Raises `UserError` if the record is missing or damaged."""
    found = read_record(place.records, entry.key)
    if found is None:
        raise UserError(f"out: the record '{entry.key}' of {entry.arm} is missing or damaged; run the same command again, it is made again")
    return found[0]


def tuning_of(job: Job, outcomes: Outcomes) -> Any:
    """The recipe of a tuning job: from the study, or from the selection that it waits for."""
    assert job.group is not None
    return job.tuning or next(outcome for name in job.waits if isinstance(outcome := outcomes[name], Choices))[job.group.arm].tuning


def with_classified(job: Job, place: Place, data: StudyData, outcomes: Outcomes) -> StudyData:
    """The data of a tuning job: those of its lesson, if its arm has one; where it waits for the classification, each training item says whether it is
    familiar to the base."""
    facts = None if job.group is None else place.study.lesson_of(job.group.arm)
    if facts is not None:
        return data.taught(facts)
    before = [entry for name in job.waits if isinstance(outcome := outcomes[name], Read) for entry in outcome.entries]
    found = [entry for entry in before if entry.frame == NOVELTY]
    return replace(data, train=marked(data.train, frame_of(place, found[0]))) if found else data


def _tune(job: Job, place: Place, data: StudyData, outcomes: Outcomes, display: Display) -> Weights:
    assert job.group is not None
    weights = tuned_weights(job.group, tuning_of(job, outcomes), data, job.run.tuning_seed, place.out, display)
    card: Any = tuning_summary(weights)
    if card is not None:
        report = card["report"]
        display.say(
            f"{job.run} · {job.group.label}: {report['examples']} examples, {report['steps']} steps, {report['parameters']:,} parameters tuned, "
            f"{report['trained_share']:.0%} of {report['tokens']:,} tokens trained on, {report['seconds']:.0f} s, "
            f"loss {report['losses'][0]:.2f} to {report['losses'][-1]:.2f}"
        )
    return weights


def readings_of(inputs: Inputs) -> list[Reading]:
    """The distinct readings that the study's measures ask for."""
    study = inputs.study
    return list(dict.fromkeys(reading for name in study.measures for reading in measures()[name].readings(inputs, study.settings_of(name))))


def _read(job: Job, place: Place, inputs: Inputs, outcomes: Outcomes, display: Display) -> Read:
    """Loads the group once and makes the records that are missing."""
    entries: list[Entry] = []
    costs: dict[str, dict[str, Any]] = {}
    for reading, subject in opened(job, place, inputs, outcomes, display):
        entries += _take(reading, subject, inputs, job, place, display)
        costs |= costs_of(subject)
        del subject  # frees its memory for what is loaded next
    return Read(tuple(entries), costs)


def opened(job: Job, place: Place, inputs: Inputs, outcomes: Outcomes, display: Display) -> Iterator[tuple[Reading, Outputs | Pair]]:
    """Loads what a reading job reads, and yields each reading with its subject: first readings of outputs, then readings inside the model."""
    group, study = job.group, inputs.study
    assert group is not None
    given = group.kind in ("expert", "direct") and job.tuned is None
    tuned = given_weights(study, group, inputs.data, place.folder) if given else outcomes[job.tuned] if job.tuned else None
    readings = [Recalled()] if job.kind == "classify" else readings_of(inputs)
    outer = [reading for reading in readings if reading.subject is Outputs]
    inner = [reading for reading in readings if reading.subject is Pair and group.kind in ("base", "direct")]
    choices = choices_of(job, study, outcomes)
    tuned = at_step(study, group, tuned)
    weights = members_of(group, mixtures_of(study, group, choices), inputs.data, tuned, any(reading.beside_base for reading in outer))
    members: dict[str, Member] = {}
    if outer:
        with display.bar(f"{job.run} · loading {', '.join(weights)}", None):
            members = load_members(weights, prepacked=True)
        bias = bias_for(study, group, members["base"], tuned) if group.kind == "bias" else None
        subject = Outputs(members, weights, mixtures_of(study, group, choices, bias), fitted=tuned if group.kind == "bias" else None)
        for reading in outer:
            yield reading, subject
        del subject
    if inner:
        pair = _pair(group.label, inputs.data, members, tuned)
        for reading in inner:
            yield reading, pair


def _pair(label: str, data: StudyData, members: dict[str, Member], tuned: Weights | None) -> Pair:
    """Base and tuned model as plain models: the loaded ones, unpacked, if they are whole models; otherwise loaded with the adapter merged.

    Empties `members`: what is of no use here is freed before anything is loaded.
    """
    plain = tuned is None or tuned.adapter is None
    fingerprint = members["expert"].fingerprint if "expert" in members else None
    found = {name: member for name, member in members.items() if plain and name in ("base", "expert")}
    members.clear()
    unpack_linear_layers(*(member.model for member in found.values()))
    base = found.get("base") or load_member(data.base, field="models.base")
    if tuned is None:
        return Pair(label, base)
    expert = found.get("expert") or load_member(tuned.path, tuned.adapter, field=tuned.field, merged=True)
    check_same_shape(base, expert)
    return Pair(label, base, expert, fingerprint)


def _take(reading: Reading, subject: Outputs | Pair, inputs: Inputs, job: Job, place: Place, display: Display) -> Iterator[Entry]:
    """The entries of one reading's records; records that are missing are made."""
    keys, protocol = keys_of(reading, subject, inputs), protocol_of(reading, inputs)
    missing = arms_of(missing_of(keys, place))
    found: dict[str, dict[str, Any]] = {}
    first = reading.first_prompt(inputs) if job.group is not None and job.group.kind == "base" and job.run == place.study.runs[0] else None
    if missing:
        if first:
            display.say(f"{reading.name}: {first}")
        chosen = subject.only(missing)
        try:
            with display.bar(f"{job.run} · {reading.name} · {', '.join(missing)}", reading.steps(chosen, inputs)) as progress:
                found = reading.read(chosen, inputs, progress)
        except UserError as error:
            if isinstance(subject, Outputs):
                raise
            raise UserError(f"arms.{subject.label}, {error}") from error
        for label, frames in found.items():
            for frame, items in frames.items():
                provenance = {
                    "study": inputs.study.study,
                    "world": job.run.world,
                    "seed": job.run.seed,
                    "reading": reading.name,
                    "frame": frame,
                    "protocol": protocol,
                    "weights": subject.weights(label),
                    "threads": inputs.study.threads,
                } | ({} if job.run.tuning == 0 else {"tuning": job.run.tuning})
                write_record(place.records, keys[label, frame], items, provenance)
    for label in arms_of(keys):
        right = "".join(f", {100 * score_of(items):.1f} % right" for items in found.get(label, {}).values() if "right" in items)
        display.say(f"{job.run} · {label} · {reading.name}: {'read' if label in missing else 'from its record'}{right}")
    for (label, frame), key in keys.items():
        yield Entry(label, frame, job.run, protocol, key, first or "")


def protocol_of(reading: Reading, inputs: Inputs) -> str:
    """The reading's protocol, hashed once per process: it covers every item."""
    return str(inputs.once(("protocol", reading, reading.version), lambda: reading.protocol(inputs)))


def keys_of(reading: Reading, subject: Outputs | Pair, inputs: Inputs) -> dict[tuple[str, str], str]:
    """The key of every record that the reading makes from the subject, by arm and frame.

    It is a hash of the frame's name, the protocol (`Reading.protocol`: everything that decides how arms are asked), the seed, and the subject's
    `causes` (fingerprints of the weights, with the mixture's coefficients).
    """
    protocol, names = protocol_of(reading, inputs), reading.frames(subject, inputs)
    return {
        (label, frame): content_key(frame=frame, protocol=protocol, seed=inputs.seed, **subject.causes(label))
        for label in subject.labels
        for frame in names
    }


def missing_of(keys: Mapping[tuple[str, str], str], place: Place) -> list[tuple[str, str]]:
    """The arm and frame of each record that is missing. Arms that are the same mixture have one record, which is the first one's."""
    first = {key: of for of, key in reversed(list(keys.items()))}
    return [of for of, key in keys.items() if first[key] == of and not has_record(place.records, key)]


def arms_of(records: Iterable[tuple[str, str]]) -> list[str]:
    """The arms among records given by arm and frame, each once."""
    return list(dict.fromkeys(arm for arm, _ in records))


def costs_of(subject: Outputs | Pair) -> dict[str, dict[str, Any]]:
    """What each arm cost to tune and costs to serve; empty for a `Pair`."""
    if isinstance(subject, Pair):
        return {}
    found = {}
    for arm, mixture in subject.mixtures.items():
        names = list(active(mixture))
        sources = [subject.sources[name] for name in names] + ([] if subject.fitted is None else [subject.fitted])
        cards = [card for source in sources if (card := tuning_summary(source)) is not None]
        found[arm] = tuning_cost(cards) | serving_cost(subject.members, names)
    return found
