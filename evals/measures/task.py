"""Task: what tuning is for. The questions of the test items, asked in the study's format."""

from typing import Any

from evals.display.cells import Table
from evals.measures.answers import Chosen, Generated
from evals.measures.inputs import Inputs
from evals.measures.measure import Measure, Reading, Settings, Share
from evals.measures.registry import register
from evals.measures.shares import Shares, estimate_shares, share_rows, share_table, summarize_shares
from evals.results.header import Header
from evals.results.recorded import Recorded


class Task(Measure[Shares]):
    name = "task"
    question = "How many of the task's questions does an arm answer correctly?"
    controls = "The same items and prompts for every arm; an answer that cannot be parsed is wrong, and is counted."
    needs = frozenset({"test"})
    role = "gain"
    summary = Shares

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        if inputs.data.choose:
            return [Chosen("task", "test", "question")]
        return [Generated("task", "test", "question", number=inputs.data.number)]

    def summarize(self, records: Recorded, settings: Settings) -> Shares:
        return summarize_shares(records, "task")

    def tables(self, summary: Shares, header: Header) -> list[Table]:
        return share_table(self.name, summary, header)

    def rows(self, summary: Shares) -> list[dict[str, Any]]:
        return share_rows(self.name, summary)

    def share(self, records: Recorded) -> Share:
        return Share(estimate_shares(records, "task"), records.by_seed("task"))


register(Task())
