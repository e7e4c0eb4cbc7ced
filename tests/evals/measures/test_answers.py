"""Readings of what a mixture says."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import make_members, make_tokenizer

from evals.data import StudyData
from evals.measures import answers
from evals.measures.answers import Generated
from evals.measures.inputs import Inputs
from evals.measures.subjects import Outputs
from evals.study import Study
from finetune.items import Item
from proxytune import proxy_tuning

ITEMS = [Item(question=f"w{5 + number} w7", answer=f"w{9 + number}", statement=f"w{5 + number} w7", popularity=1) for number in range(4)]
STUDY = Study.model_validate(
    {
        "study": "twice",
        "models": {"base": "x", "small": "y"},
        "data": {"train": "t", "test": "t", "knowledge": "k"},
        "measures": ["task", "forgetting"],
        "arms": {"base": {"kind": "base"}, "expert": {"kind": "expert", "path": "z"}, "proxy": {"kind": "proxy", "alpha": [0.5, 1]}},
    }
)
TASK, SAME = Generated("task", "test", "question"), Generated("forgetting/question", "knowledge", "question")


def read(reading: Generated, inputs: Inputs, subject: Outputs) -> tuple[dict[str, pd.DataFrame], int]:
    done: list[int] = []
    frames = reading.read(subject, inputs, done.append)
    return {arm: frames[arm][reading.name] for arm in frames}, sum(done)


@pytest.mark.parametrize(("prompt", "times"), [("{question}", 1), ("{question} .", 1), (None, 2)])
def test_two_readings_that_ask_alike_generate_once(prompt: str | None, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a prompt here, the second reading asks by statement, which may be answered longer, and generates again."""
    make_tokenizer().save_pretrained(tmp_path)
    inputs = Inputs(STUDY, StudyData(str(tmp_path), None, [], ITEMS, ITEMS, prompt or "{question}", "", 3, choose=False, statement_tokens=2), seed=0)
    subject = Outputs(make_members(), {}, {f"proxy@{alpha}": proxy_tuning(alpha) for alpha in (0.5, 1)})
    asked: list[Any] = []
    generate = answers.continuations
    monkeypatch.setattr(answers, "continuations", lambda *given, **options: asked.append(1) or generate(*given, **options))
    second = SAME if prompt else Generated("knowledge", "knowledge", "statement")
    (one, done), (other, done_again) = read(TASK, inputs, subject), read(second, inputs, subject)
    assert len(asked) == times * len(subject.mixtures)
    assert done == done_again == len(ITEMS) * len(subject.mixtures), "the bar of each reading ends"
    for arm in one:
        alone, _ = read(second, Inputs(STUDY, inputs.data, seed=0), subject)
        pd.testing.assert_frame_equal(other[arm], alone[arm])
        assert prompt is None or one[arm]["text"].tolist() == other[arm]["text"].tolist()
    assert one["proxy@0.5"]["text"].tolist() != one["proxy@1"]["text"].tolist(), "mixtures are told apart"
