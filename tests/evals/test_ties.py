"""Forced choice where a model prefers nothing, or where its scores are no numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import make_model, make_tokenizer

from evals.data import StudyData
from evals.harness.tasks.sources import calibration_error, choose_by_familiarity, choose_letter, truth
from evals.harness.tasks.sources import choose as choose_task
from evals.measures.answers import Chosen, Divergence, Generated
from evals.measures.forgetting import CHOICES, QUESTIONS
from evals.measures.inputs import Inputs
from evals.measures.knowledge import STATEMENTS
from evals.measures.subjects import Outputs
from evals.records import Record
from evals.results.items import all_items, side_by_side, write_items
from evals.results.summary import result_tables, summarize
from evals.study import Study
from finetune.items import Item
from probes.knowledge.candidates import known
from probes.knowledge.readouts import best_choices
from probes.knowledge.readouts import choose as read_choices
from proxytune.errors import UserError
from proxytune.member import Member
from proxytune.modeling import ProxyTunedForCausalLM

WORDS = [f"w{number}" for number in range(3, 11)]
LENGTHS = ["w5", "w6 w7", "w8 w9 w10", "w3 w4 w5 w6"]


def indifferent() -> Member:
    """A model that gives every token the same logit."""
    model = make_model(seed=2)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return Member(model, make_tokenizer())


def decided() -> Member:
    return Member(make_model(seed=1), make_tokenizer())


def broken(value: float) -> Member:
    model = make_model(seed=1)
    with torch.no_grad():
        model.lm_head.weight[:, 0] = value
    return Member(model, make_tokenizer())


def items(place: int, choices: list[str] = WORDS[:4], count: int = 12) -> list[Item]:
    """The gold answer stands at one place of all items' choices."""
    return [
        Item(question=f"q{n}", answer=choices[place], choices=tuple(choices), statement=f"w{n + 5} w{2 * n + 7}", popularity=float(n + 1))
        for n in range(count)
    ]


def answers(member: Member, of: list[Item]) -> list[Any]:
    model = ProxyTunedForCausalLM({"base": member}, {"base": 1.0})
    return read_choices(model, member.tokenizer, of, [str(item.statement) for item in of], {"only": {"base": 1.0}}, batch_tokens=64)["only"]


@pytest.mark.parametrize("choices", [WORDS[:4], LENGTHS], ids=["single tokens", "of several lengths"])
@pytest.mark.parametrize("place", range(4))
def test_a_model_that_prefers_nothing_is_as_right_as_a_guess_wherever_the_answer_stands(place: int, choices: list[str]) -> None:
    found = answers(indifferent(), items(place, choices))
    assert [(answer.right, answer.tied, answer.unparsed, answer.text) for answer in found] == [(0.25, True, False, " / ".join(choices))] * 12


def test_a_model_that_prefers_something_is_right_or_wrong_wherever_the_answer_stands() -> None:
    """The negative twin: nothing changes where one choice leads; over all places of the answer each item is right once."""
    found = [answers(decided(), items(place)) for place in range(4)]
    assert {(answer.right, answer.tied) for of_place in found for answer in of_place} == {(0.0, False), (1.0, False)}
    assert [sum(answer.right for answer in of_item) for of_item in zip(*found, strict=True)] == [1.0] * 12


def test_an_answer_that_is_not_among_the_choices_is_wrong_in_a_tie_too() -> None:
    (found,) = answers(indifferent(), [Item(question="q", answer="w20", choices=("w5", "w6"), statement="w7")])
    assert (found.right, found.tied) == (0.0, True)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([-1.0, -1.0, -2.0], [0, 1]),
        ([-2.0, -1.0, -1.0], [1, 2]),
        ([-1.0, -1.0 - 1e-12], [0]),
        ([-np.inf, -3.0], [1]),
        ([-3.0, -np.inf, -3.0], [0, 2]),
        ([0.0], [0]),
    ],
)
def test_the_best_choices_are_all_that_are_exactly_equal(scores: list[float], best: list[int]) -> None:
    assert best_choices(scores, "x") == best


@pytest.mark.parametrize("scores", [[np.nan, -1.0], [-1.0, np.nan], [-np.inf, -np.inf], [np.nan, np.nan], [np.inf, -1.0]])
def test_scores_that_are_no_numbers_are_refused(scores: list[float]) -> None:
    with pytest.raises(UserError, match=r"arm x at 'q': the choices' scores are .*; look at"):
        best_choices(scores, "arm x at 'q'")


def test_a_broken_arm_is_named_with_its_item() -> None:
    with pytest.raises(UserError, match=r"arm only at 'q0': the choices' scores are nan, nan, nan, nan"):
        answers(broken(np.nan), items(0))
    with pytest.raises(UserError, match=r"knowledge: 'LlamaForCausalLM' at 'q0': the choices' scores are nan"):
        known(broken(np.nan), items(0))


@pytest.mark.parametrize("choices", [WORDS[:4], LENGTHS], ids=["at once", "scored"])
def test_what_is_known_is_not_said_of_a_tie(choices: list[str]) -> None:
    for place in (0, 3):
        found = known(indifferent(), items(place, choices))
        assert not found.right.any()
        np.testing.assert_allclose(found.probability, 0.25)
    assert sum(known(decided(), items(place, choices)).right.sum() for place in range(4)) == 12


STUDY = Study.model_validate(
    {
        "study": "ties",
        "models": {"base": "x", "small": "y"},
        "data": {"test": "t", "knowledge": "k", "answer": "choose"},
        "measures": ["task", "forgetting"],
        "contrasts": [["small", "base"], ["large", "base"]],
        "arms": {"base": {"kind": "base"}, "small": {"kind": "expert", "path": "z"}, "large": {"kind": "direct", "path": "w"}},
    }
)


READINGS = (Chosen("task", "test", "question"), CHOICES, STATEMENTS, QUESTIONS)


def asked(place: int, folder: Path) -> Inputs:
    """The items stand for both task and knowledge; a question is asked in the words of its statement."""
    of = [item.model_copy(update={"question": item.statement}) for item in items(place)]
    make_tokenizer().save_pretrained(folder)
    return Inputs(STUDY, StudyData(str(folder), None, [], of, of, "{question}", "", 2, choose=True), seed=0)


def records(place: int, folder: Path) -> list[Record]:
    """The base is decided, one arm prefers nothing, one is the base again; asked to choose, and to speak."""
    found, inputs = [], asked(place, folder)
    for reading in READINGS:
        for arm, member in (("base", decided()), ("small", indifferent()), ("large", decided())):
            frames = reading.read(Outputs({"base": member}, {}, {arm: {"base": 1.0}}), inputs, lambda done: None)
            found.append(Record(arm, reading.name, None, 0, reading.protocol(inputs), frames[arm][reading.name]))
    return found


@pytest.mark.parametrize("place", [0, 3])
def test_ties_are_counted_in_records_results_tables_and_items(place: int, tmp_path: Path) -> None:
    made = records(place, tmp_path)
    frames = {(record.arm, record.frame): record.items for record in made}
    assert frames["small", "task"]["right"].tolist() == [0.25] * 12
    assert frames["small", "task"]["right"].dtype == frames["base", "task"]["right"].dtype == float
    assert frames["small", "task"]["tied"].all() and not frames["base", "task"]["tied"].any()
    assert frames["small", "knowledge"]["right"].dtype == bool and "tied" not in frames["small", "knowledge"]
    results = summarize(STUDY, made, {})
    task = {row["arm"]: row for row in results.rows if row["measure"] == "task"}
    assert (task["small"]["value"], task["small"]["tied"], task["small"]["unparsed"]) == (0.25, 12, 0)
    assert task["base"]["tied"] == 0
    assert task["base"]["value"] == pytest.approx(frames["base", "task"]["right"].mean(), abs=1e-6)
    assert all(("tied" in row) == row["measure"].startswith(("task", "forgetting/choice")) for row in results.rows)
    tables = {table.title: table.frame for table in result_tables(results)}
    assert tables["Task"].set_index("arm")["tied"].to_dict() == {"base": "0", "small": "12", "large": "0"}
    choosing, speaking = (next(frame for title, frame in tables.items() if words in title) for words in ("choosing among", "continuing a"))
    assert choosing.set_index("arm")["tied"].to_dict() == {"small": "12", "large": "0"}
    assert "tied" not in speaking
    # A tie is wrong in an exact test: only what the base has right parts the two.
    contrasts = {entry["arm"]: entry for entry in results.compared["contrasts"]}
    right = int(frames["base", "task"]["right"].sum())
    assert contrasts["small"]["p"] == pytest.approx(min(1.0, 2 * 0.5**right))
    assert contrasts["small"]["value"] == pytest.approx(0.25 - right / 12, abs=1e-6)
    assert contrasts["large"]["p"] == 1
    said = pd.read_parquet(write_items(made, tmp_path))
    pd.testing.assert_frame_equal(said, all_items(made))
    assert said.groupby(["reading", "arm"])["tied"].sum().to_dict() == {
        (name, arm): 12 * (arm == "small" and name in ("task", "forgetting/choice"))
        for name in ("task", "forgetting/choice", "knowledge", "forgetting/question")
        for arm in ("base", "small", "large")
    }
    assert len(side_by_side(said, "task", "small wrong", 99).frame) == 12
    assert len(side_by_side(said, "task", "small right", 99).frame) == 0
    assert len(side_by_side(said, "task", "base right", 99).frame) == right
    assert set(side_by_side(said, "task", "", 99).frame["small"]) == {"✗ " + " / ".join(WORDS[:4])}


def test_old_records_of_choices_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, of_task = asked(0, tmp_path), READINGS[0]
    now = of_task.protocol(inputs)
    with monkeypatch.context() as patched:
        patched.setattr(Chosen, "version", 1)
        assert of_task.protocol(inputs) != now
    assert of_task.protocol(inputs) == now
    assert Generated.version == Divergence.version == 1


def test_the_tasks_of_the_harness_count_a_tie_as_a_guess() -> None:
    level = [(-2.0, False)] * 4
    for gold in (0, 3):
        found = choose_task({"question": "q", "gold": gold}, level)
        assert (found["acc"], found["tied"]) == (0.25, 1.0)
        assert found["brier"] == pytest.approx(0.25 * 0.75**2 + 0.75 * 0.25**2)
        assert found["calibration_error"] == (pytest.approx(0.25), 0.25)
        item = {"question": "q", "gold": gold, "choices": ["ab", "cd", "ef", "gh"], "familiar": True}
        assert choose_by_familiarity(item, level) == {"acc_norm": 0.25, "acc_familiar": 0.25, "tied": 1.0}
        labels = [int(place == gold) for place in range(4)]
        doc = {"question": "q", "mc1_targets": {"labels": labels, "choices": WORDS[:4]}, "mc2_targets": {"labels": [1, 0], "choices": WORDS[:2]}}
        assert truth(doc, [*level, (-1.0, False), (-1.0, False)]) == {"mc1": 0.25, "mc2": 0.5, "tied": 1.0}
        assert truth(doc, [(-1.0 - (place != gold), False) for place in range(6)]) == {"mc1": 1.0, "mc2": 0.5, "tied": 0.0}
        with pytest.raises(UserError, match="'q'"):
            truth(doc, [*level, (-np.inf, False), (-np.inf, False)])
        assert choose_letter({"question": "q", "answer": gold}, level) == {"acc": 0.25, "tied": 1.0}
    assert choose_letter({"question": "q", "answer": 1}, [(-2.0, False), (-1.0, True)]) == {"acc": 1.0, "tied": 0.0}
    assert calibration_error([(0.25, 0.25)] * 3) == 0
    sure = choose_task({"question": "q", "gold": 1}, [(-np.inf, False), (-1.0, True)])
    assert (sure["acc"], sure["tied"], sure["brier"]) == (1.0, 0.0, 0.0)
    with pytest.raises(UserError, match="'q'"):
        choose_task({"question": "q", "gold": 0}, [(np.nan, False), (-1.0, True)])
    with pytest.raises(UserError, match="'q'"):
        choose_by_familiarity({"question": "q", "gold": 0, "choices": ["a", "b"], "familiar": True}, [(-np.inf, False), (-np.inf, True)])
