"""Knowledge: what tuning may lose. Statements in the pretraining format, continued by greedy decoding; their facts are in no tuning data."""

from typing import Any

from evals.display.cells import Table
from evals.measures.answers import Generated
from evals.measures.inputs import Inputs
from evals.measures.measure import Measure, Reading, Settings, Share
from evals.measures.registry import register
from evals.measures.shares import Shares, estimate_shares, share_rows, share_table, summarize_shares
from evals.results.header import Header
from evals.results.recorded import Recorded

STATEMENTS = Generated("knowledge", "knowledge", "statement")


class Knowledge(Measure[Shares]):
    name = "knowledge"
    question = "How many statements from pretraining does an arm still continue correctly?"
    controls = "Statements of facts that the corpus states at least once; the same items for every arm."
    needs = frozenset({"knowledge.statement"})
    role = "kept"
    summary = Shares

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        return [STATEMENTS]

    def summarize(self, records: Recorded, settings: Settings) -> Shares:
        return summarize_shares(records, STATEMENTS.name)

    def tables(self, summary: Shares, header: Header) -> list[Table]:
        return share_table(self.name, summary, header)

    def rows(self, summary: Shares) -> list[dict[str, Any]]:
        return share_rows(self.name, summary)

    def share(self, records: Recorded) -> Share:
        return Share(estimate_shares(records, STATEMENTS.name), records.by_seed(STATEMENTS.name))


register(Knowledge())
