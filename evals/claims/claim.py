"""What the ledger says of one finding of the literature: the claim, what would refute it, and how it is measured and checked here.

A finding is one file in `findings/` with a `CLAIM`. A new probe adds its study to `evidence` there; nothing else has to be changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from evals.measures.registry import measures
from evals.results.summary import Results
from evals.statistics.judged import Verdict, judged
from evals.statistics.power import Needs
from probes.verdict import Clause, verdict

Answer = Literal["supported", "not supported", "cannot tell"]


@dataclass(frozen=True)
class Part:
    """One verdict of a study. Parts with `decides` false say more than was claimed, or something else; they do not decide the claim."""

    verdict: Verdict
    decides: bool = True


@dataclass(frozen=True)
class Evidence:
    """A shipped study (its name in `evals/studies`), and the parts that its results give."""

    study: str
    parts: Callable[[Results], Sequence[Part]]


@dataclass(frozen=True)
class Beside:
    """A number or sentence as it was printed, and what comes out."""

    what: str
    printed: str
    recomputed: str


@dataclass(frozen=True)
class Claim:
    """`outside` recomputes what others printed, from the `files` of a folder of their data; without `files` it needs none. `missing` says what no
    study here measures."""

    number: int
    name: str
    claim: str
    source: str
    refuted_by: str
    controls: str
    evidence: tuple[Evidence, ...] = ()
    outside: Callable[[Path], Sequence[Beside]] | None = None
    files: tuple[str, ...] = ()
    missing: str = ""


def verdicts_of(results: Results, claim: str) -> list[Verdict]:
    """All verdicts of the results' measures on one claim."""
    return [found for name, summary in results.measures.items() for found in measures()[name].verdicts(summary) if found.claim == claim]


def judge(arm: str, rule: Clause, row: dict[str, Any], runs: int) -> Verdict:
    """The verdict of a rule of one clause on a row of results (`value`, `low`, `high`, perhaps `needs`)."""
    needs = None if row.get("needs") is None else Needs(**row["needs"])
    clause = rule._replace(
        value=row["value"], low=row["low"], high=row["high"], runs=runs, needs=needs.number if needs and needs.of == "seeds" else None
    )
    return Verdict(arm, rule.claim, verdict([clause], {rule.name: rule}), judged([clause]))


def answer(verdicts: Sequence[str]) -> Answer:
    """Not supported if any verdict is, supported if all are, else cannot tell."""
    if "not supported" in verdicts:
        return "not supported"
    return "supported" if verdicts and set(verdicts) == {"supported"} else "cannot tell"


def row_of(rows: Sequence[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with these values. Raises KeyError if there is none."""
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            return row
    raise KeyError(f"no row with {wanted}")
