"""Knowledge: what tuning may lose. Statements in the pretraining format, continued by greedy decoding; their facts are in no tuning data."""

from evals.measures.answers import Generated
from evals.measures.inputs import Inputs
from evals.measures.measure import Reading, Settings
from evals.measures.registry import register
from evals.measures.shares import ShareMeasure

STATEMENTS = Generated("knowledge", "knowledge", "statement")


class Knowledge(ShareMeasure):
    name = "knowledge"
    question = "How many statements from pretraining does an arm still continue correctly?"
    controls = "Statements of facts that the corpus states at least once; the same items for every arm."
    needs = frozenset({"knowledge.statement"})
    role = "kept"

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        return [STATEMENTS]


register(Knowledge())
