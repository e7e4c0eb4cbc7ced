"""One model from the command line: what comes out loads, mixes and is what the library would have made."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command

from evals.commands.tune import Run, tune_one
from evals.data import data_for
from evals.measures.answers import Generated
from evals.measures.inputs import Inputs
from evals.measures.subjects import Outputs
from evals.running.jobs import readings_of
from evals.running.progress import Display
from evals.study import load_study
from finetune.encoding import encode_examples, preview
from finetune.formats import read_items
from finetune.items import Item
from finetune.recipe import Tuning, TuningRun
from finetune.tuning import tune
from proxytune.errors import UserError
from proxytune.member import Weights, load_member, load_tokenizer

SETTINGS = {"method": "lora", "learning_rate": 0.01, "epochs": 1.0, "batch_size": 4, "rank": 2}
PROMPT = "{question}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"question": f"w{number} w5", "answer": f"w{number + 1}"}) + "\n" for number in range(10, 18)))
    return path


def test_the_command_tunes_shows_and_says_what_is_next(lora_family: Path, data: Path, tmp_path: Path) -> None:
    small = lora_family / "small"
    options = ["--epochs", 1, "--batch-size", 4, "--rank", 2, "--learning-rate", 0.01, "--prompt", PROMPT, "--threads", 1]
    done = run_command("tune", small, data, "--out", tmp_path / "lora", *options)
    assert done.returncode == 0, done.stderr
    assert "w10 w5⟦ w11<eos>⟧".replace(" ", "") in done.stderr.replace(" ", "")
    items = [Item(question=f"w{number} w5", answer=f"w{number + 1}") for number in range(10, 18)]
    tune(TuningRun(small, items, Tuning(**SETTINGS), prompt=PROMPT, ending="", seed=0, out=tmp_path / "same"))
    assert load_member(small, tmp_path / "lora").fingerprint == load_member(small, tmp_path / "same").fingerprint
    following = shlex.split(done.stdout.strip().replace("LARGE", str(lora_family / "base")))
    answered = run_command(*following[1:], "--new-tokens", 4)
    assert answered.returncode == 0, answered.stderr


def test_what_is_trained_on_is_marked(lora_family: Path) -> None:
    tokenizer = load_tokenizer(lora_family / "small")
    row = encode_examples([Item(question="w5 w6", answer="w7")], tokenizer, "w4 {question}", "")[0]
    shown = preview(row, tokenizer)
    assert shown.index("w6") < shown.index("⟦") < shown.index("w7") < shown.index("<eos>") < shown.index("⟧")


def of(lora_family: Path, train: Path, out: Path, **changes: Any) -> Run:
    settings = SETTINGS | changes.pop("settings", {})
    return Run(**({"model": str(lora_family / "small"), "data": str(train), "out": out, "settings": settings, "prompt": PROMPT, "seed": 0} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"rank": 0}}, "--rank: .*not 0"),
        ({"settings": {"learning_rate": -1.0}}, "--learning-rate: .*not -1.0"),
        ({"settings": {"kl": 1.0, "preference": 0.1}}, "kl, consistent and preference are three losses"),
        ({"settings": {"consistent": 1.0}}, "--consistent: an expert is tuned for a base .* give --base"),
        ({"prompt": "{answer}"}, "--prompt: the only placeholder"),
        ({"prompt": "chat"}, "the tokenizer has no chat template"),
        ({"data": "nothing.jsonl"}, "data: there is no file 'nothing.jsonl'"),
    ],
)
def test_mistakes_name_their_option(lora_family: Path, data: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        tune_one(of(lora_family, data, tmp_path / "out", **changes), Display())
    with pytest.raises(UserError, match="is there already"):
        tune_one(of(lora_family, data, tmp_path), Display())


def test_a_result_with_a_test_can_be_compared_by_the_command_that_is_printed(lora_family: Path, data: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text('{"question": "w30 w5", "answer": "w31"}\n{"question": "w10 w6", "answer": "w31"}\n')
    said = tune_one(of(lora_family, data, tmp_path / "out", test=str(test), base=str(lora_family / "base")), Display())
    comparing = shlex.split(said.splitlines()[1])
    assert comparing[:2] == ["proxytune", "compare"]
    done = run_command(*comparing[1:], "--out", tmp_path / "runs", "--format", "json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [entry["arm"] for entry in results["costs"]] == ["base", "expert", "proxy@0.5", "proxy@1"]
    assert results["costs"][1]["runs"] == 1


def test_test_questions_that_are_tuned_on_are_refused_unless_allowed(lora_family: Path, data: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text('{"question": "W10  w5!", "answer": "w31"}\n')
    with pytest.raises(UserError, match=r"--test: .*1 test question is also in train"):
        tune_one(of(lora_family, data, tmp_path / "out", test=str(test)), Display())
    tune_one(of(lora_family, data, tmp_path / "out", test=str(test), allow_overlap=True), Display())


TEMPLATE = "{% for message in messages %}{{ message['role'] == 'user' and 'w40 ' or 'w41 ' }}{{ message['content'] }}{{ ' <eos> ' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}w41 {% endif %}"


def test_a_chat_is_tuned_and_measured_in_the_models_own_template(lora_family: Path, tmp_path: Path) -> None:
    for name in ("base", "small"):
        shutil.copytree(lora_family / name, tmp_path / name)
        tokenizer = load_tokenizer(tmp_path / name)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(tmp_path / name)
    turns = [("user", "w5 w6"), ("assistant", "w7"), ("user", "w8"), ("assistant", "w9 w10")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 4)
    tokenizer = load_tokenizer(tmp_path / "small")
    items = read_items(tmp_path / "chats.jsonl", "data").items
    shown = [preview(row, tokenizer) for row in encode_examples(items[:2], tokenizer, "chat", "")]
    assert shown == ["w40 w5 w6 <eos> w41⟦ w7 <eos>⟧".replace("⟦ ", "⟦"), "w40 w5 w6 <eos> w41 w7 <eos> w40 w8 <eos> w41⟦w9 w10 <eos>⟧"]
    test = tmp_path / "test.jsonl"
    test.write_text('{"question": "w30 w5", "answer": "w31"}\n{"question": "w10 w6", "answer": "w31"}\n')
    one = of(
        lora_family,
        tmp_path / "chats.jsonl",
        tmp_path / "out",
        model=str(tmp_path / "small"),
        base=str(tmp_path / "base"),
        prompt="chat",
        test=str(test),
    )
    said = tune_one(one, Display())
    asked = shlex.split(said.splitlines()[0])
    assert run_command(*asked[1:], "--chat", "base", "--new-tokens", 3).returncode == 0
    done = run_command(*shlex.split(said.splitlines()[1])[1:], "--out", tmp_path / "runs", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert 'first prompt "w40 w30 w5 <eos> w41 " = [40, 30, 5, 2, 41]' in done.stderr
    with pytest.raises(UserError, match="has earlier turns"):
        encode_examples(items[1:2], tokenizer, PROMPT, "")


def test_preferences_show_both_answers(lora_family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "w5 w6", "chosen": "w7", "rejected": "w8"}\n' * 4)
    tune_one(of(lora_family, tmp_path / "pairs.jsonl", tmp_path / "out", settings={"preference": 0.1}), Display())
    assert "w5 w6⟦w7 <eos>⟧ over ⟦w8 <eos>⟧" in capsys.readouterr().err


def test_worked_answers_are_compared_by_their_last_number(lora_family: Path, data: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text('{"question": "w30 w5", "answer": "w31 #### 31"}\n')
    tune_one(of(lora_family, data, tmp_path / "out", test=str(test)), Display())
    study, folder = load_study(tmp_path / "out" / "study.yaml")
    asked = Inputs(study, data_for(study, folder, study.runs[0], tmp_path), 0)
    (task,) = readings_of(asked)
    assert isinstance(task, Generated)
    assert task.number
    small = Weights(str(lora_family / "small"))
    subject = Outputs({"base": load_member(small.path)}, {"base": small}, {"base": {"base": 1.0}})
    short = replace(asked, data=replace(asked.data, new_tokens=4))
    said = {number: replace(task, number=number).read(subject, short, lambda _: None)["base"]["task"] for number in (True, False)}
    texts = {number: frame["text"][0] for number, frame in said.items()}
    assert texts[True] == texts[False]
    assert said[True]["right"][0] == (re.findall(r"\d+", texts[True])[-1:] == ["31"])
    assert task.protocol(asked) != replace(task, number=False).protocol(asked)
