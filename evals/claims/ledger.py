"""The ledger: every finding's claim, and the record of what was measured and recomputed for it.

Records are files beside this one that `proxytune claims --run`, `--from` and `--outside` write; nobody types them. A record holds the verdicts of a
shipped study as its results.json had them, with its date and hashes.
"""

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from evals.claims import findings
from evals.claims.claim import Answer, Beside, Claim, Evidence, Part, answer
from evals.invalid import did_you_mean
from evals.results.provenance import study_hash, versions
from evals.results.summary import read_results
from evals.study import STUDIES, Study, load_study
from proxytune.errors import UserError
from proxytune.files import check_readable, check_writable

RECORDS = Path(__file__).parent / "records"


@dataclass(frozen=True)
class Measured:
    """What a study says. `date` is when its results were written (UTC); `study_hash` is that of the whole study file, `results_hash` of results.json;
    `versions` are those that the record was made with."""

    study: str
    study_hash: str
    date: str
    results_hash: str
    seeds: tuple[int, ...]
    worlds: tuple[str, ...]
    versions: dict[str, str]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Recomputed:
    """What came out of other people's files, with their SHA-256."""

    date: str
    files: dict[str, str]
    rows: tuple[Beside, ...]


@dataclass(frozen=True)
class Record:
    measured: tuple[Measured, ...] = ()
    recomputed: Recomputed | None = None


RECORD = TypeAdapter(Record)


@cache
def claims() -> dict[str, Claim]:
    """All claims by name, in the order of their numbers."""
    modules = [importlib.import_module(f"{findings.__name__}.{module.name}") for module in pkgutil.iter_modules(findings.__path__)]
    return {claim.name: claim for claim in sorted((module.CLAIM for module in modules), key=lambda claim: claim.number)}


def claim_of(name: str) -> Claim:
    """Raises `UserError` if there is none of that name."""
    if name not in claims():
        raise UserError(f"claims: there is none called {name!r}; {did_you_mean(name, list(claims()))}")
    return claims()[name]


def answer_to(record: Record) -> Answer:
    """By all parts that decide; cannot tell where nothing was measured."""
    return answer([part.verdict.verdict for measured in record.measured for part in measured.parts if part.decides])


def waiting(claim: Claim, record: Record) -> list[str]:
    """What the record lacks, or has of another version of a study."""
    have = {measured.study: measured for measured in record.measured}
    lacking = [f"the study '{one.study}' has not been recorded" for one in claim.evidence if one.study not in have]
    changed = [name for name, measured in have.items() if measured.study_hash != study_hash(shipped(name))]
    return [*([claim.missing] if claim.missing else []), *lacking, *(f"the study '{name}' has changed since" for name in changed)]


def shipped(name: str) -> Study:
    return load_study(STUDIES / f"{name}.yaml")[0]


def read_record(name: str, folder: Path = RECORDS) -> Record:
    """The claim's record; an empty one if there is none. Raises `UserError` for a file that is none."""
    path = folder / f"{name}.json"
    check_readable(path, "records")
    try:
        return RECORD.validate_json(path.read_bytes()) if path.exists() else Record()
    except ValidationError as error:
        raise UserError(f"records: '{path}' is not what proxytune claims writes ({error.errors()[0]['msg']}); write it again with --run") from error


def write_record(name: str, record: Record, folder: Path = RECORDS) -> Path:
    path = folder / f"{name}.json"
    check_writable(path, "records")
    path.write_text(json.dumps(RECORD.dump_python(record, mode="json"), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def with_measured(claim: Claim, record: Record, measured: Measured) -> Record:
    """The record with this study's part new, in the order of the claim's evidence."""
    have = {one.study: one for one in record.measured} | {measured.study: measured}
    return replace(record, measured=tuple(have[one.study] for one in claim.evidence if one.study in have))


def measure(evidence: Evidence, folder: Path) -> Measured:
    """What a finished run of the study says. Raises `UserError` if the folder holds no results, or those of another study."""
    results_file = folder / "results.json"
    results = read_results(results_file)
    if ran_study(folder) != shipped(evidence.study):
        raise UserError(f"claims: '{folder}' was not made by the shipped study '{evidence.study}' as it is now; run it again")
    try:
        parts = tuple(evidence.parts(results))
    except KeyError as error:
        raise UserError(f"claims: '{results_file}' lacks what the claim is judged by ({error}); run the study again") from error
    return Measured(
        evidence.study,
        study_hash(shipped(evidence.study)),
        _date(results_file.stat().st_mtime),
        _hash(results_file),
        results.header.seeds,
        results.header.worlds,
        versions(),
        parts,
    )


def ran_study(folder: Path) -> Study:
    """The study that a run's folder holds. Raises `UserError` if there is none."""
    path = folder / "study.json"
    check_readable(path, "claims")
    try:
        return Study.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"claims: '{folder}' holds no study.json of this version; give the folder that proxytune compare wrote to") from error


def recompute(claim: Claim, folder: Path) -> Recomputed | None:
    """What comes out of other people's files; None if the claim has nothing to recompute. Raises `UserError` for a file that is not there."""
    if claim.outside is None:
        return None
    for name in claim.files:
        if not (folder / name).is_file():
            raise UserError(f"--outside: '{folder / name}' is not there; give the folder of the files that the claim '{claim.name}' is checked with")
        check_readable(folder / name, "--outside")
    return Recomputed(_date(datetime.now(UTC).timestamp()), {name: _hash(folder / name) for name in claim.files}, tuple(claim.outside(folder)))


def claims_with(study: str) -> list[tuple[Claim, Evidence]]:
    """The claims that a study says something about. Raises `UserError` if there is none."""
    found = [(claim, one) for claim in claims().values() for one in claim.evidence if one.study == study]
    if not found:
        names: Sequence[str] = sorted({one.study for claim in claims().values() for one in claim.evidence})
        raise UserError(f"claims: no claim is judged by the study '{study}'; there are {', '.join(names)}")
    return found


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
