"""One model from the command line: what comes out loads, mixes and is what the library would have made."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from evals.progress import Display
from evals.tune import tune_one
from finetune.data import Item, encode_examples, preview
from finetune.recipe import Tuning
from finetune.tuning import tune
from proxytune import UserError, load_member, load_tokenizer

SETTINGS = {"method": "lora", "learning_rate": 0.01, "epochs": 1.0, "batch_size": 4, "rank": 2}
PROMPT = "{question}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"question": f"w{number} w5", "answer": f"w{number + 1}"}) + "\n" for number in range(10, 18)))
    return path


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "evals.cli", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_the_command_tunes_shows_and_says_what_is_next(lora_family: Path, data: Path, tmp_path: Path) -> None:
    small = lora_family / "small"
    options = ["--epochs", 1, "--batch-size", 4, "--rank", 2, "--learning-rate", 0.01, "--prompt", PROMPT, "--threads", 1]
    done = run("tune", small, data, "--out", tmp_path / "lora", *options)
    assert done.returncode == 0, done.stderr
    assert "w10 w5⟦ w11<eos>⟧".replace(" ", "") in done.stderr.replace(" ", "")
    items = [Item(question=f"w{number} w5", answer=f"w{number + 1}") for number in range(10, 18)]
    tune(small, items, Tuning(**SETTINGS), prompt=PROMPT, ending="", seed=0, out=tmp_path / "same")
    assert load_member(small, tmp_path / "lora").fingerprint == load_member(small, tmp_path / "same").fingerprint
    following = shlex.split(done.stdout.strip().replace("LARGE", str(lora_family / "base")))
    answered = run(*following[1:], "--new-tokens", 4)
    assert answered.returncode == 0, answered.stderr


def test_what_is_trained_on_is_marked(lora_family: Path) -> None:
    tokenizer = load_tokenizer(lora_family / "small")
    row = encode_examples([Item(question="w5 w6", answer="w7")], tokenizer, "w4 {question}", "")[0]
    shown = preview(row, tokenizer)
    assert shown.index("w6") < shown.index("⟦") < shown.index("w7") < shown.index("<eos>") < shown.index("⟧")


@pytest.mark.parametrize(
    ("settings", "prompt", "words"),
    [
        ({"rank": 0}, PROMPT, "--rank: .*not 0"),
        ({"learning_rate": -1.0}, PROMPT, "--learning-rate: .*not -1.0"),
        ({}, "{answer}", "--prompt: the only placeholder"),
    ],
)
def test_mistakes_name_their_option(lora_family: Path, data: Path, tmp_path: Path, settings: dict, prompt: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tune_one(str(lora_family / "small"), data, tmp_path / "out", SETTINGS | settings, prompt, 0, Display())
    with pytest.raises(UserError, match="is there already"):
        tune_one(str(lora_family / "small"), data, tmp_path, SETTINGS, PROMPT, 0, Display())
