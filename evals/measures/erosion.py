"""Erosion: the verdict on "direct tuning erodes what lower layers hold", arm by arm, by the clauses of `probes/verdict.py`.

Controls are arms of the same study that differ from the judged arm in one setting: `shuffled: true`, and `frozen: lower` selected to match it
(`select: {match: ARM}`). The state of a clause is "cannot tell" if the study lacks its control or its reading, or if the arm was tuned only once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.display.cells import Table
from evals.measures.controls import frozen_twin, is_control
from evals.measures.density import density_change
from evals.measures.dose import changed_clauses, separation_of
from evals.measures.inputs import Inputs
from evals.measures.knowledge import STATEMENTS
from evals.measures.measure import Measure, Reading, Settings
from evals.measures.recoverability import RecoverabilityFound, Recovered
from evals.measures.registry import measures, register
from evals.measures.restoration import restored_by_seed
from evals.measures.states import layers_of
from evals.measures.verdicts import Scales, beyond_shuffled, clause, tuning_runs, verdict_table
from evals.results.header import Header
from evals.results.recorded import Recorded
from evals.statistics.estimates import intervals, means_by_unit
from evals.statistics.judged import Verdict, judged
from probes.internals.blocks import thirds
from probes.verdict import RULE, Clause, measured, verdict

CLAIM = "direct tuning erodes what lower layers hold"
SCALES: Scales = {
    "density": (1000.0, 1, "thousandths of effective rank"),
    "restoration": (100.0, 1, "points of probability"),
    "freezing": (100.0, 1, "points right"),
    "savings": (1.0, 2, "share of the steps"),
    "names": (1.0, 3, "AUROC"),
}
LOWER = ("neurons", "low")  # where names are read for the verdict
JUDGED_BY = ("density", "restoration", "recoverability")


@dataclass(frozen=True)
class ErosionFound:
    verdicts: tuple[Verdict, ...]


class Erosion(Measure[ErosionFound]):
    name = "erosion"
    question = "Does direct tuning erode what lower layers hold? The verdict, from density, restoration, freezing and relearning."
    controls = "Random deltas; tuning on shuffled answers; as much change elsewhere; the lower half frozen at the same task score."
    needs = frozenset({"knowledge.statement", "knowledge.choices", "knowledge.popularity"})
    built_on = ("density", "drift", "lens", "restoration", "recoverability")
    summary = ErosionFound

    def readings(self, inputs: Inputs, settings: Settings) -> list[Reading]:
        return [each for name in JUDGED_BY for each in measures()[name].readings(inputs, inputs.study.settings_of(name))]

    def summarize(self, records: Recorded, settings: Settings) -> ErosionFound:
        base = records.study.base_arm
        arms = [arm for arm in records.arms("states") if arm in records.study.rows and arm != base and not is_control(records.study, arm)]
        return ErosionFound(tuple(_judge(records, arm) for arm in arms))

    def tables(self, summary: ErosionFound, header: Header) -> list[Table]:
        return [verdict_table(row, SCALES, header) for row in summary.verdicts]

    def verdicts(self, summary: ErosionFound) -> Sequence[Verdict]:
        return summary.verdicts


# What is concluded


def _judge(records: Recorded, arm: str) -> Verdict:
    runs = tuning_runs(records, arm, "states")
    relearned: RecoverabilityFound = records.summary("recoverability")
    of_arm = next((row for row in relearned.arms if row.arm == arm), None)
    clauses = [
        *_density(records, arm, runs),
        *_restoration(records, arm, runs),
        _freezing(records, arm, runs),
        _savings(of_arm, runs),
    ]
    names = _names(records, arm, runs)
    # What the base does not show cannot be eroded: then the names are shown, but not judged.
    rule = RULE if any(one.value is not None for one in names) else {name: one for name, one in RULE.items() if name.partition("/")[0] != "names"}
    return Verdict(arm, CLAIM, verdict([*clauses, *(one for one in names if one.name in rule)], rule), judged([*clauses, *names]))


def _density(records: Recorded, arm: str, runs: int) -> list[Clause]:
    low = list(thirds(layers_of(records("states", arm)[0]))["low"])

    def change(label: str) -> list[np.ndarray]:
        return density_change(records, label, [("residual", "last", low)])

    seeds = change(arm)
    return [
        clause(records, "density", seeds, 0, None, runs),
        clause(records, "density/random", seeds, 0, 1, runs),
        beyond_shuffled(records, "density/shuffled", arm, seeds, change, runs),
    ]


def _restoration(records: Recorded, arm: str, runs: int) -> list[Clause]:
    if not records.has("restoration", arm):
        return [measured(name, None, runs, note="restoration was not measured") for name in ("restoration", "restoration/elsewhere")]
    names, seeds = restored_by_seed(records, arm)
    first = clause(records, "restoration", seeds, names.index(("shapley", "low")), names.index(("shapley", "high")), runs)
    control = next((names.index((kind, "low")) for kind in ("same-norm", "same-number") if (kind, "low") in names), None)
    if control is None:
        return [first, measured("restoration/elsewhere", None, runs, note="more than half of the change is in the low block")]
    alone = names.index(("recovery", "low"))
    return [first, clause(records, "restoration/elsewhere", seeds, alone, control, runs, note=f"minus {names[control][0]}")]


def _freezing(records: Recorded, arm: str, runs: int) -> Clause:
    twin = frozen_twin(records.study, arm)
    if twin is None or not records.has(STATEMENTS.name, arm):
        missing = "no arm with its lower half frozen is selected to match" if twin is None else "knowledge was not measured"
        return measured("freezing", None, runs, note=missing)
    seeds = []
    for frame, other in zip(records(STATEMENTS.name, twin), records(STATEMENTS.name, arm), strict=True):
        known = (frame["popularity"] != 0).to_numpy()
        right = np.stack([frame["right"], other["right"]], axis=1).astype(float)[known]
        seeds.append(means_by_unit(frame[known], right))
    return clause(records, "freezing", seeds, 0, 1, runs, note=f"{twin} minus {arm}")


def _savings(row: Recovered | None, runs: int) -> Clause:
    if row is None:
        return measured("savings", None, runs, note="recoverability was not measured")
    saved = row.savings
    if saved is None or saved.value is None or saved.low is None or saved.high is None:
        nothing = row.lost.low is None or row.lost.low <= 0
        return measured("savings", None, runs, note="nothing was lost beyond noise" if nothing else "not every curve could be read")
    return measured("savings", (saved.value, saved.low, saved.high), runs)


def _names(records: Recorded, arm: str, runs: int) -> list[Clause]:
    names = ("names", "names/shuffled")
    if not records.has("spread", arm):
        return [measured(name, None, runs, note="not judged: names were not read") for name in names]
    (seen,) = intervals(records.estimate(separation_of(records, records.study.base_arm, *LOWER)))
    if not seen.low > 0:
        return [measured(name, None, runs, note="not judged: in low layers the base does not tell them apart") for name in names]
    return changed_clauses(records, names, arm, *LOWER, runs)


register(Erosion())
