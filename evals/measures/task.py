"""Task: what tuning is for. The questions of the test items, asked in the study's format."""

from evals.measures.answers import Chosen, Generated
from evals.measures.inputs import Inputs
from evals.measures.measure import Reading, Settings
from evals.measures.registry import register
from evals.measures.shares import ShareMeasure


class Task(ShareMeasure):
    name = "task"
    question = "How many of the task's questions does an arm answer correctly?"
    controls = "The same items and prompts for every arm; an answer that cannot be parsed is wrong, and is counted."
    needs = frozenset({"test"})
    role = "gain"

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        if inputs.data.choose:
            return [Chosen("task", "test", "question")]
        return [Generated("task", "test", "question", number=inputs.data.number)]


register(Task())
