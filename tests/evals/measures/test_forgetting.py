"""What forgetting shows of read-outs that tell the same."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_summaries import HEADER
from planted import study_of
from pydantic import TypeAdapter

from evals.measures.forgetting import CHOICES, QUESTIONS, Agreement, Forgetting, Forgotten
from evals.measures.knowledge import STATEMENTS
from evals.measures.measure import Settings
from evals.records import Record
from evals.results.recorded import Recorded

ITEMS = 400


def found(differ: int) -> Forgotten:
    """Of two arms; by choosing, so many of the 800 answers are right where the statement's is wrong."""
    generator = np.random.default_rng(0)
    common: dict[str, Any] = {"unit": [f"{place}" for place in range(ITEMS)], "popularity": np.arange(ITEMS) % 4 + 1.0, "text": "", "unparsed": False}
    records = []
    for arm in ("base", "full"):
        right = generator.random(ITEMS) < 0.6
        chosen = right.copy()
        chosen[np.flatnonzero(~right)[: differ // 2]] = True
        for name, of_readout in ((STATEMENTS.name, right), (QUESTIONS.name, generator.random(ITEMS) < 0.3), (CHOICES.name, chosen)):
            records.append(Record(arm, name, "tiny", 0, name, pd.DataFrame(common | {"right": of_readout.astype(float)})))
    return Forgetting().summarize(Recorded(study_of(1), records), Settings())


def titles(summary: Forgotten) -> list[str]:
    return [table.title.partition(", ")[2].partition(" (")[0] for table in Forgetting().tables(summary, HEADER)]


def test_of_two_read_outs_that_tell_the_same_the_first_is_shown_and_it_is_said() -> None:
    """Twin: where they differ in more than one answer of a hundred both are shown. Results hold both always."""
    same, other = found(differ=2), found(differ=20)
    assert Agreement(STATEMENTS.name, CHOICES.name, 798 / 800, 800) in same.agreements
    assert titles(same) == ["continuing a statement", "asked in the tuned format"]
    notes = [table.note for table in Forgetting().tables(same, HEADER)]
    assert notes[0].endswith("Choosing among candidates agrees in 99.8 % of 800 answers and is not shown.")
    assert "agrees" not in notes[1]
    assert titles(other) == [*titles(same), "choosing among candidates, in any format"]
    assert not any("agrees" in table.note for table in Forgetting().tables(other, HEADER))
    for summary in (same, other):
        assert {row["measure"].split("/k=")[0] for row in Forgetting().rows(summary)} == {"forgetting", "forgetting/question", "forgetting/choice"}


def test_agreements_survive_json() -> None:
    summary = found(differ=2)
    as_json = TypeAdapter(Forgotten).dump_json(summary)
    assert TypeAdapter(Forgotten).validate_json(as_json) == summary
    assert len(summary.agreements) == 3
    assert summary.agreements[0].share == pytest.approx(np.mean([0.4, 0.5]), abs=0.15)
