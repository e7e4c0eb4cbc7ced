"""proxytune report BASE TUNED: two paths in, one page out, and what is missing is said."""

import json
from pathlib import Path

import pytest
from helpers import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from evals.cli import app
from evals.commands.report import KNOWLEDGE, report_study
from evals.data import data_for
from evals.study import Run
from proxytune.errors import UserError

PROMPT = "Question: {question}\nAnswer:"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that spell bytes, so that they can read any text."""
    folder = tmp_path_factory.mktemp("models")
    vocabulary = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, seed, hidden in (("large", 1, 32), ("tuned", 2, 32), ("small", 3, 16), ("small-tuned", 4, 16)):
        make_model(seed=seed, hidden=hidden, rows=len(vocabulary)).save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>").save_pretrained(folder / name)
    items = [
        {"question": f"What is {number}?", "statement": f"The number {number} is", "answer": f"{number % 3}", "choices": ["0", "1", "2"]}
        | {"popularity": number % 4, "unit": str(number)}
        for number in range(24)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (folder / "test.jsonl").write_text("".join(json.dumps({"question": item["question"], "answer": item["answer"]}) + "\n" for item in items))
    return folder


def test_two_paths_give_one_page_and_what_is_missing_is_said(place: Path, tmp_path: Path) -> None:
    given = ["report", place / "large", place / "tuned", "--knowledge", place / "items.jsonl", "--out", tmp_path, "--threads", 1, "--jobs", 1]
    result = CliRunner().invoke(app, list(map(str, given)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    said = result.stdout.splitlines()
    assert any(line.startswith(("tuned has", "tuned and base")) for line in said)
    assert "Not measured: what was gained (no task items: --data)." in said
    assert "Not measured: steering (no expert: --expert and --antiexpert)." in said
    page = (tmp_path / "report.html").read_text()
    assert "Ordinary text" in page
    assert "Not measured: what an arm gained" in page
    assert {row["arm"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]} == {"base", "tuned"}


def test_with_everything_given_there_is_an_answer_and_nothing_is_missing(place: Path, tmp_path: Path) -> None:
    given = ["report", place / "large", place / "tuned", "--expert", place / "small-tuned", "--antiexpert", place / "small", "--jobs", 1]
    given += ["--data", place / "test.jsonl", "--knowledge", place / "items.jsonl", "--out", tmp_path, "--threads", 1]
    result = CliRunner().invoke(app, list(map(str, given)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Not measured" not in result.stdout
    assert any(line.startswith(("Steer:", "Tune:", "It depends:", "Cannot tell:")) for line in result.stdout.splitlines())


def test_without_items_the_shipped_ones_are_read(place: Path) -> None:
    study = report_study(str(place / "large"), [str(place / "tuned")], None, None, None, None, PROMPT, 1)
    assert "density" in study.measures
    data = data_for(study, Path(), Run(None, 0), Path())
    assert len(data.knowledge) == len(KNOWLEDGE.read_text().splitlines()) > 100
    assert (
        "density" not in report_study(str(place / "large"), [str(place / "tuned")], None, None, None, str(place / "items.jsonl"), PROMPT, 1).measures
    )


@pytest.mark.parametrize(
    ("tuned", "expert", "words"),
    [(["a", "a"], None, "names a model twice"), (["a"], "e", "--expert and --antiexpert belong together")],
)
def test_mistakes_are_one_line(tuned: list[str], expert: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        report_study("base", tuned, expert, None, None, None, PROMPT, 1)
