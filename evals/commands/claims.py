"""`proxytune claims`: the ledger of the findings of the literature, measured again, read from finished runs, or printed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evals.claims.ledger import RECORDS, claim_of, claims, claims_with, measure, ran_study, read_record, recompute, with_measured, write_record
from evals.claims.tables import entry_tables, ledger_table, plain, printed_table
from evals.display.render import draw
from evals.study import STUDIES, load_study
from proxytune.content import as_json

RUNS = Path("proxytune-runs")


def update(name: str | None, run: bool, folders: Sequence[Path], outside: Path | None, jobs: int | None, records: Path = RECORDS) -> None:
    """Rewrites records: from studies that are run (in the folder of each study's name), from finished runs, and from other people's files."""
    from evals.commands.compare import run_and_show

    chosen = claims() if name is None else {name: claim_of(name)}
    studies = list(dict.fromkeys(one.study for claim in chosen.values() for one in claim.evidence)) if run else []
    for study in studies:
        loaded, place = load_study(STUDIES / f"{study}.yaml")
        run_and_show(loaded, place, RUNS / study, RUNS / study, None, jobs, False)
    for folder in [*(RUNS / study for study in studies), *folders]:
        for claim, evidence in claims_with(ran_study(folder).study):
            if claim.name in chosen:
                write_record(claim.name, with_measured(claim, read_record(claim.name, records), measure(evidence, folder)), records)
    for claim in chosen.values() if outside is not None else ():
        assert outside is not None
        found = recompute(claim, outside)
        if found is not None:
            write_record(claim.name, replace(read_record(claim.name, records), recomputed=found), records)


def show(name: str | None, form: str, records: Path = RECORDS) -> None:
    """Prints the ledger, or one entry of it."""
    names = list(claims()) if name is None else [claim_of(name).name]
    entries = {one: (claims()[one], read_record(one, records)) for one in names}
    if form == "json":
        print(as_json([plain(*entry) for entry in entries.values()]))
        return
    tables = [ledger_table(entries), printed_table(entries)] if name is None else entry_tables(*entries[name])
    print(draw(tables, form))
