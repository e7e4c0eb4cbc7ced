"""Data and scoring rules of the tasks beside this file.

A task's data come from the folder $PROXYTUNE_DATA/TASK (JSON lines or Parquet, one file per split, with the columns of the hub set) or,
if there is no such folder, from the hub. Nothing is downloaded for the world and the capitals.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, load_dataset
from scipy.special import logsumexp

from evals.sandbox import SETUP_FAILED, Program, run_programs
from evals.statistics.scores import brier, expected_calibration_error
from evals.study import STUDIES
from finetune.formats import read_items
from finetune.items import Item
from probes.knowledge.readouts import best_choices, judge_number, judge_reply
from probes.world.family import SHIPPED, find_family
from probes.world.ledger import items_of
from probes.world.sections.people import QUESTION
from proxytune.errors import UserError
from proxytune.files import check_readable

FAMILIAR = 0.5  # capitals above this quantile of the population are familiar


def world(seed: int = 0, **_: Any) -> DatasetDict:
    """The embedded world's facts about people who are in no tuning data; `seed` is that of a shipped family."""
    family = find_family("default", seed, SHIPPED)
    if family is None:
        raise UserError(f"metadata: the world of seed {seed} is not shipped; take one from 0 to 9")
    items = [item for item in items_of(pd.read_parquet(family / "ledger.parquet"), "test") if item.popularity]
    return DatasetDict(test=Dataset.from_list([_row(item, QUESTION.format(question=item.question)) for item in items]))


def capitals(**_: Any) -> DatasetDict:
    """Capitals of countries, with the countries' populations; half of them are `familiar`."""
    items = read_items(STUDIES / "capitals" / "knowledge.jsonl", "capitals").items
    rows = [_row(item, f"Question: {item.question}\nAnswer:") for item in items]
    middle = pd.Series([row["popularity"] for row in rows]).quantile(FAMILIAR)
    return DatasetDict(test=Dataset.from_list([row | {"familiar": row["popularity"] > middle} for row in rows]))


def stored(task: str, hub: str, splits: dict[str, str], configuration: str | None = None, **_: Any) -> DatasetDict:
    """The splits of a data set, from the folder of the task's name or from the hub."""
    home = os.environ.get("PROXYTUNE_DATA")
    folder = None if home is None else Path(home) / task
    if folder is None or not folder.is_dir():
        try:
            return DatasetDict({name: load_dataset(hub, configuration, split=split) for name, split in splits.items()})
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{task}: '{hub}' cannot be had ({reason}); set PROXYTUNE_DATA to a folder that holds {task}/test.jsonl") from error
    found = {}
    for name in splits:
        files = [folder / f"{name}.{kind}" for kind in ("jsonl", "parquet") if (folder / f"{name}.{kind}").exists()]
        if files:
            check_readable(files[0], task)
            kind = "parquet" if files[0].suffix == ".parquet" else "json"
            found[name] = load_dataset(kind, data_files=str(files[0]), split="train")
    if "test" not in found:
        raise UserError(f"{task}: '{folder}' has neither test.jsonl nor test.parquet; put one there")
    # The harness needs every split that a task names, whether it is used or not.
    return DatasetDict({name: found.get(name, found["test"].select([])) for name in splits})


def read_rightly(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """A text is right if it begins with the answer. A text that begins with no candidate is unparsed, and wrong."""
    item = Item(question=doc["question"], answer=doc["answer"], choices=tuple(doc["choices"]), reply=doc["reply"] or None)
    answer = judge_reply(results[0], item)
    return {"exact_match": float(answer.right), "unparsed": float(answer.unparsed)}


def choose(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, Any]:
    """Accuracy by the summed log-probability, and the calibration of the choice's share of the choices' probability.

    A tie of k choices counts 1/k in all our forced-choice tasks, as in a study; `tied` is the share of items with a tie.
    lm-eval's own acc and acc_norm take the first of tied choices and may differ.
    """
    scores = np.array([score for score, _ in results])
    right, tied = _share(doc, scores, [place == doc["gold"] for place in range(len(scores))])
    sure = np.array([np.exp(scores - logsumexp(scores)).max()])
    expected = right * brier(sure, np.array([True])) + (1 - right) * brier(sure, np.array([False]))
    return {"acc": right, "brier": float(expected), "calibration_error": (float(sure[0]), right), "tied": tied}


def calibration_error(answers: list[tuple[float, bool | float]]) -> float:
    """The calibration error of a whole task, in ten bins."""
    confidence, right = zip(*answers, strict=True)
    return float(expected_calibration_error(np.array(confidence), np.array(right, float)))


def choose_by_familiarity(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Accuracy by the log-probability per character, for all facts and separately for familiar and unfamiliar facts."""
    scores = [score / max(1, len(choice)) for (score, _), choice in zip(results, doc["choices"], strict=True)]
    right, tied = _share(doc, scores, [place == doc["gold"] for place in range(len(scores))])
    return {"acc_norm": right, "acc_familiar" if doc["familiar"] else "acc_unfamiliar": right, "tied": tied}


def choose_letter(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """MMLU: the answer's letter has the highest log-probability."""
    scores = [score for score, _ in results]
    right, tied = _share(doc, scores, [place == doc["answer"] for place in range(len(scores))])
    return {"acc": right, "tied": tied}


def solve(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """GSM8K: the last number of the text is compared with the answer's. A text without a number is unparsed, and wrong."""
    answer = judge_number(results[0], Item(question=doc["question"], answer=doc["answer"]))
    return {"exact_match": float(answer.right), "unparsed": float(answer.unparsed)}


def name_one(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """TriviaQA: right if the text's first line is one of the aliases, ignoring case, articles and punctuation."""
    said = _bare(results[0].split("\n")[0])
    aliases = {_bare(alias) for alias in [doc["answer"]["value"], *doc["answer"]["aliases"]]}
    return {"exact_match": float(said in aliases), "unparsed": float(not said)}


def truth(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """TruthfulQA. mc1: the one true choice is the most probable; mc2: the true choices' share of the probability."""
    scores = np.array([score for score, _ in results])
    single = len(doc["mc1_targets"]["choices"])
    right, tied = _share(doc, scores[:single], [label == 1 for label in doc["mc1_targets"]["labels"]])
    second = scores[single:]
    best_choices(second.tolist(), _item(doc))
    probability = np.exp(second - second.max())
    true = np.array(doc["mc2_targets"]["labels"], bool)
    return {"mc1": right, "mc2": float(probability[true].sum() / probability.sum()), "tied": tied}


def complete_function(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """HumanEval: whether the completed function passes its tests, in the sandbox."""
    test = f"{doc['test']}\n\ncheck({doc['entry_point']})\n"
    return _passes(Program(doc["prompt"] + results[0], test, doc["entry_point"], doc["prompt"]))


def write_program(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """MBPP: whether the program passes the tests, in the sandbox. The function that the tests call first is the entry point."""
    tests = "\n".join(doc["test_list"])
    called = re.search(r"assert[\s(]+(?:not\s+)?(?:\w+\()*?(\w+)\(", tests)
    test = f"{doc['test_setup_code']}\n{tests}\n"
    return _passes(Program(results[0], test, called[1] if called else ""))


def _passes(program: Program) -> dict[str, float]:
    (verdict,) = run_programs([program])
    if verdict.reason == SETUP_FAILED:
        raise UserError(f"task: the prompt or the tests of '{program.entry_point}' fail before any answer is tried; correct the task's data")
    return {"pass_at_1": float(verdict.passed)}


def true_choices(doc: dict[str, Any]) -> list[str]:
    return [*doc["mc1_targets"]["choices"], *doc["mc2_targets"]["choices"]]


def _share(doc: dict[str, Any], scores: Sequence[float] | np.ndarray, right: Sequence[bool]) -> tuple[float, float]:
    """The share of right choices among the most probable ones, and 1 if there are several most probable ones, else 0."""
    best = best_choices([float(score) for score in scores], _item(doc))
    return sum(right[place] for place in best) / len(best), float(len(best) > 1)


def _item(doc: dict[str, Any]) -> str:
    return f"the item {doc.get('question')!r}"


def _row(item: Item, prompt: str) -> dict[str, Any]:
    return {
        "question": item.question,
        "prompt": prompt,
        "statement": item.statement or "",
        "answer": item.answer,
        "reply": item.reply or "",
        "choices": list(item.choices),
        "gold": item.choices.index(item.answer),
        "popularity": item.popularity or 0.0,
    }


def _bare(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
