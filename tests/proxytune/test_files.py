"""Pipes and devices are not read, and nothing is written through a link; ordinary files are and may be."""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from evals.cli import Format, compare
from evals.display.drawing import save
from evals.harness.tasks.sources import complete_function, stored, write_program
from evals.records import Record, read_record, write_record
from evals.results.items import FILE, read_items_of, write_items
from evals.study import load_study
from finetune.formats import read_items
from proxytune.errors import UserError
from proxytune.files import check_readable, check_writable

PIPE = "is a pipe, a socket or a device, not a file; write its content into a file and give that"
LINK = "is a link or no file, and results are not written through it; remove it or choose another folder"


def test_what_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "piped").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "link", "missing", "loop", "."):
        check_readable(tmp_path / name, "data")
    for path in (tmp_path / "pipe", tmp_path / "piped", Path("/dev/zero")):
        with pytest.raises(UserError, match=rf"^data: '{path}' {PIPE}$"):
            check_readable(path, "data")


def test_links_out_of_a_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    (inner / "deep").mkdir(parents=True)
    for path in (tmp_path / "secret", inner / "file", tmp_path / "inner-2"):
        path.write_text("x")
    for name, target in {"in": "file", "out": "../secret", "nowhere": "../missing", "beside": "../inner-2", "deep/up": "../file"}.items():
        (inner / name).symlink_to(target)
    for name in ("file", "in", "deep/up", "missing"):
        check_readable(inner / name, "data", within=inner)
    for name in ("out", "nowhere", "beside"):
        check_readable(inner / name, "data")
        with pytest.raises(
            UserError, match=rf"^data: '.*{name}' leads out of '.*inner' by a link; put a copy of the file in its place, or remove it$"
        ):
            check_readable(inner / name, "data", within=inner)


def test_what_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "nowhere").symlink_to("missing")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "new"):
        check_writable(tmp_path / name, "out")
    for name in ("link", "nowhere", "pipe", "."):
        with pytest.raises(UserError, match=f"^out: '.*' {LINK}$"):
            check_writable(tmp_path / name, "out")


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.parquet", "train"])
def test_a_pipe_is_no_data(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"^data.train: '.*{name}' {PIPE}$"):
        read_items(tmp_path / name, "data.train")
    (tmp_path / name).unlink()
    row = {"question": "Who?", "answer": "Me"}
    (tmp_path / "kept").mkdir()
    kept = tmp_path / "kept" / name
    if name.endswith(".parquet"):
        pd.DataFrame([row]).to_parquet(kept)
    else:
        kept.write_text('{"question": "Who?", "answer": "Me"}')
    (tmp_path / name).symlink_to(kept)  # a link to a file that the user names is as good as the file
    assert read_items(tmp_path / name, "data.train").items[0].answer == "Me"


def test_a_pipe_is_no_study_and_no_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "study.yaml")
    with pytest.raises(UserError, match=f"^study: '.*study.yaml' {PIPE}$"):
        load_study(tmp_path / "study.yaml")
    (tmp_path / "gsm8k").mkdir()
    os.mkfifo(tmp_path / "gsm8k" / "test.jsonl")
    monkeypatch.setenv("PROXYTUNE_DATA", str(tmp_path))
    with pytest.raises(UserError, match=f"^gsm8k: '.*test.jsonl' {PIPE}$"):
        stored("gsm8k", "openai/gsm8k", {"test": "test"})
    (tmp_path / "gsm8k" / "test.jsonl").unlink()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "q"}')
    assert stored("gsm8k", "openai/gsm8k", {"test": "test"})["test"]["question"] == ["q"]


def record(text: str = "said") -> Record:
    row = {"unit": "u", "question": "q", "answer": "a", "text": text, "right": True, "unparsed": False}
    return Record("base", "task", None, 0, "protocol", pd.DataFrame([row]))


def test_results_are_not_written_through_a_link(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for name, write in {
        "key.parquet": lambda: write_record(tmp_path, "key", record().items, {}),
        f"key.{os.getpid()}.partial": lambda: write_record(tmp_path, "key", record().items, {}),
        FILE: lambda: write_items([record()], tmp_path),
        f".{FILE}": lambda: write_items([record()], tmp_path),
        "frontier.png": lambda: save(plt.figure(), tmp_path / "frontier.png"),
    }.items():
        (tmp_path / name).symlink_to(secret)
        with pytest.raises(UserError, match=f"^out: '.*{name}' {LINK}$"):
            write()
        assert secret.read_text() == "secret"
        (tmp_path / name).unlink()
        write()
        write()  # over a file of before
    assert read_record(tmp_path, "key") is not None
    assert read_items_of(tmp_path)["text"].tolist() == ["said"]


class WorkBegunError(Exception):
    pass


@pytest.mark.parametrize("name", ["study.json", "results.json", "costs.json", FILE])
def test_compare_refuses_links_before_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise WorkBegunError

    monkeypatch.setattr("evals.commands.compare.run_study", work)
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "secret").write_text("secret")
    (out / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=f"^out: '.*{name}' {LINK}$"):
        compare(None, out, form=Format.table)
    (out / name).unlink()
    (out / name).write_text("of a run before")
    with pytest.raises(WorkBegunError):
        compare(None, out, form=Format.table)


@pytest.mark.parametrize("prompt", ["import nothing_such\n\ndef f():\n    'One.'\n", "def f():\n    'One.'\n"])
def test_a_code_task_that_fails_by_itself_is_no_failed_answer(prompt: str) -> None:
    doc = {"prompt": prompt, "test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"}
    programs = {"test_list": ["assert f() == 1"], "test_setup_code": ""}
    if "nothing_such" in prompt:
        with pytest.raises(UserError, match=r"^task: the prompt or the tests of 'f' fail before any answer is tried; correct the task's data$"):
            complete_function(doc, ["    return 1"])
        with pytest.raises(UserError, match=r"^task: the prompt or the tests of 'f' fail before"):
            write_program(programs | {"test_list": ["assert f() == 1)"]}, ["def f():\n    return 1"])
    else:
        for value in (1, 2):
            assert complete_function(doc, [f"    return {value}"]) == {"pass_at_1": float(value == 1)}
            assert write_program(programs, [f"def f():\n    return {value}"]) == {"pass_at_1": float(value == 1)}
