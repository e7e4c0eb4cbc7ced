"""Verdicts as results hold them: the clauses of a claim, each with its interval, its state and the seeds that would decide it."""

from collections.abc import Sequence
from dataclasses import dataclass

from evals.statistics.value import Value
from probes.verdict import ALL_CLAUSES, Clause, p_values, states


@dataclass(frozen=True)
class Judged:
    """One clause of an arm's verdict: its claim, its interval, its state (holds, fails, cannot tell), and the seeds that would decide it. `p` is that
    of an effect large enough to count, one-sided and corrected by Holm for all clauses."""

    clause: str
    claim: str
    state: str
    value: Value
    threshold: float
    needs: int | None
    note: str
    runs: int = 0
    p: float | None = None


@dataclass(frozen=True)
class Verdict:
    arm: str
    claim: str
    verdict: str
    clauses: tuple[Judged, ...]


def judged(clauses: Sequence[Clause]) -> tuple[Judged, ...]:
    """All clauses of one verdict, with their states and corrected p values."""
    return tuple(
        Judged(
            one.name,
            one.claim,
            state,
            Value(one.value, one.low, one.high),
            one.threshold,
            one.needs if state == "cannot tell" else None,
            one.note,
            one.runs,
            p,
        )
        for one, state, p in zip(clauses, states(clauses), p_values(clauses), strict=True)
    )


def clauses_of(row: Verdict) -> list[Clause]:
    """The clauses that were judged, as the rule has them."""
    return [
        ALL_CLAUSES[one.clause]._replace(value=one.value.value, low=one.value.low, high=one.value.high, runs=one.runs, needs=one.needs, note=one.note)
        for one in row.clauses
    ]
