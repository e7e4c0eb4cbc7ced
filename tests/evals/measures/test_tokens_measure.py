"""Answers explained token by token: the answers that were recorded, the probabilities of the members, and not too many."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers import STUDY, Unbroken, run_in_process

from evals.data import data_for
from evals.measures.inputs import Inputs
from evals.measures.tokens import EACH, numbers
from evals.results.items import all_items
from evals.results.summary import summarize
from evals.study import Run, Study
from finetune.encoding import prompt_ids
from proxytune.member import load_member


@pytest.fixture(scope="module")
def explained(unbroken: Unbroken, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("tokens") / "out"
    shutil.copytree(unbroken.out, out)
    study = Study.model_validate(STUDY | {"measures": ["task", "tokens"]})
    finished = run_in_process(study, out)
    return study, out, finished, summarize(study, finished.records, finished.costs)


def test_the_tokens_are_the_answers_and_few_enough(explained: Any) -> None:
    study, _, finished, results = explained
    items = all_items(finished.records)
    with_tokens = items[items["tokens"] != ""]
    assert with_tokens.groupby("arm").size().unique().tolist() == [EACH]
    assert set(with_tokens["reading"]) == {"task"}
    assert set(with_tokens["arm"]) == set(study.arm_settings)
    for text, tokens in zip(with_tokens["text"], with_tokens["tokens"], strict=True):
        said = [one["token"] for one in json.loads(tokens) if one["token"] != "<eos>"]
        assert " ".join(said).split() == text.split()
    found = {one.arm: one for one in results.measures["tokens"].arms}
    assert found["base"].changed.value == found["proxy@0"].changed.value == 0.0
    assert found["full"].changed.value > 0  # twin: a tuned model says other tokens


def test_probabilities_are_those_of_the_members(explained: Any) -> None:
    study, out, finished, _ = explained
    frame = next(record.items for record in finished.records if (record.arm, record.frame) == ("full", "tokens"))
    data = data_for(study, Path(), Run("tiny", 0), out / "worlds")
    inputs = Inputs(study, data, 0)
    row = frame.iloc[-1]
    tokens = json.loads(row["tokens"])
    ids = prompt_ids(inputs.tokenizer, inputs.prompts("test", "question")[row["number"]])
    said = ids + [inputs.tokenizer.convert_tokens_to_ids(one["token"]) for one in tokens]
    member = load_member(data.base)
    with torch.inference_mode():
        probabilities = member.model(torch.tensor([said])).logits[0].softmax(-1)
    for place, one in enumerate(tokens):
        at = len(ids) + place
        assert one["members"]["base"] == pytest.approx(probabilities[at - 1, said[at]].item(), abs=1e-4)
        best = inputs.tokenizer.decode([int(probabilities[at - 1].argmax())])
        assert (one["base"] or one["token"]) == best
        assert set(one["members"]) == {"base", "full"}
        assert one["mixture"] == one["members"]["full"]


@pytest.mark.parametrize(("change", "some"), [({}, True), ({"seeds": [5, 0]}, False)])
def test_only_the_first_seed_is_explained_and_never_too_many(unbroken: Unbroken, change: dict[str, Any], some: bool) -> None:
    study = Study.model_validate(STUDY | {"measures": ["task", "tokens"]} | change)
    data = data_for(Study.model_validate(STUDY), Path(), Run("tiny", 0), unbroken.out / "worlds")
    assert bool(numbers(Inputs(study, data, 0))) == some


def test_items_without_explanations_have_empty_tokens(unbroken: Unbroken) -> None:
    items = all_items(unbroken.finished.records)
    assert isinstance(items, pd.DataFrame)
    assert set(items["tokens"]) == {""}
