"""The ledger as tables, and as plain data for JSON."""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from evals.claims.claim import Claim
from evals.claims.ledger import RECORD, Record, answer_to, waiting
from evals.display.cells import Table, cell
from evals.statistics.judged import Judged
from evals.statistics.power import Needs

HASH = 12  # digits that are shown
NOTE = (
    "A claim is supported if every verdict that decides it is, not supported if any is not, and otherwise cannot be told; nothing more is said. "
    "Verdicts follow from rules that are fixed in code. What was measured is true of these worlds and models."
)


def ledger_table(entries: Mapping[str, tuple[Claim, Record]]) -> Table:
    """One row a claim."""
    rows = [
        {
            "no.": str(claim.number),
            "name": name,
            "claim": claim.claim,
            "verdict": answer_to(record),
            "decided by": _decided(record) or "nothing yet",
            "measured": "; ".join(f"{one.study}, {one.date}, {len(one.seeds)} seeds" for one in record.measured),
            "to note": " ".join(waiting(claim, record)),
        }
        for name, (claim, record) in entries.items()
    ]
    return Table("Findings of the literature", _without_empty(pd.DataFrame(rows, dtype=str)), NOTE)


def entry_tables(claim: Claim, record: Record) -> list[Table]:
    """One claim: the statement and its rule, every clause that was judged, and what was printed beside what comes out."""
    said = {
        "claim": claim.claim,
        "source": claim.source,
        "refuted by": claim.refuted_by,
        "controls": claim.controls,
        "verdict": answer_to(record),
        "to note": " ".join(waiting(claim, record)),
    }
    tables = [
        Table(
            f"{claim.number}. {claim.name}",
            pd.DataFrame({"what": [what for what in said if said[what]], "says": [words for words in said.values() if words]}, dtype=str),
            NOTE,
        )
    ]
    for measured in record.measured:
        rows = [
            {"verdict on": part.verdict.arm, "verdict": part.verdict.verdict, "decides": "yes" if part.decides else ""} | _clause(one)
            for part in measured.parts
            for one in part.verdict.clauses
        ]
        versions = ", ".join(f"{name} {number}" for name, number in measured.versions.items())
        where = ", ".join([f"{len(measured.seeds)} seeds", *measured.worlds])
        hashes = f"study {measured.study_hash[:HASH]}, results {measured.results_hash[:HASH]}"
        note = (
            f"Measured {measured.date} by the shipped study '{measured.study}' ({where}; {hashes}; recorded with {versions}). Shares, AUROC and "
            "correlations between 0 and 1, 95 % intervals. Needed: seeds that would decide."
        )
        tables.append(Table(f"What the study {measured.study} says", _without_empty(pd.DataFrame(rows, dtype=str)), note))
    return tables + ([] if record.recomputed is None else [printed_table({claim.name: (claim, record)})])


def printed_table(entries: Mapping[str, tuple[Claim, Record]]) -> Table:
    """What the literature printed beside what comes out."""
    rows = [
        {"name": name, "what": one.what, "printed": one.printed, "comes out": one.recomputed}
        for name, (_, record) in entries.items()
        for one in (record.recomputed.rows if record.recomputed else ())
    ]
    dates = sorted({record.recomputed.date for _, record in entries.values() if record.recomputed})
    files = {file: digest for _, record in entries.values() if record.recomputed for file, digest in record.recomputed.files.items()}
    from_files = f" from {', '.join(f'{file} ({digest[:HASH]})' for file, digest in files.items())}" if files else ""
    return Table("Printed, and what comes out", pd.DataFrame(rows, dtype=str), f"Recomputed {', '.join(dates) or 'never'}{from_files}.")


def plain(claim: Claim, record: Record) -> dict[str, Any]:
    """The whole entry, for JSON."""
    said = {name: getattr(claim, name) for name in ("number", "name", "claim", "source", "refuted_by", "controls")}
    return said | {"verdict": answer_to(record), "to_note": waiting(claim, record)} | json.loads(RECORD.dump_json(record))


def _without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.loc[:, (frame != "").any()]


def _decided(record: Record) -> str:
    """How many verdicts decide, by what they are."""
    found = pd.Series([part.verdict.verdict for measured in record.measured for part in measured.parts if part.decides], dtype=str)
    return ", ".join(f"{count} {verdict}" for verdict, count in found.value_counts(sort=False).items())


def _clause(one: Judged) -> dict[str, str]:
    return {
        "claimed": one.claim,
        "value": cell(one.value, 1, 4),
        "counts from": f"{one.threshold:g}",
        "state": one.state,
        "needed": "" if one.needs is None else str(Needs(one.needs, "seeds")),
        "note": one.note,
    }
