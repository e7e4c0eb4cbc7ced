"""Ctrl-C and SIGTERM at any moment: one line, 130 or 143, nothing temporary left, and the same command goes on to the same end."""

import contextlib
import importlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock, Timeout
from helpers import PATHS, STUDY, TUNING, once, place_world, send, while_collecting

from evals import cli
from evals.running.progress import Display
from evals.running.runner import LOCK
from probes.world.recipes import RECIPES

LINE = "proxytune: stopped; run the same command again, it continues"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line within this process; what it sets for a process is set back."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cli._received.clear()
    yield
    cli._received.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["proxytune", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture
def study(tiny_family: Path, tmp_path: Path) -> tuple[Path, Path]:
    out = place_world(tiny_family, tmp_path / "out")
    arms = {"base": {"kind": "base"}, "full": {"kind": "direct", "tuning": TUNING | {"batch_size": 24}}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | {"measures": ["task"], "arms": arms}))
    return path, out


def swallowing(number: int) -> None:
    with contextlib.suppress(BaseException):  # as some library might
        send(number)


def wrapping(number: int) -> None:
    try:
        send(number)
    except BaseException as error:
        raise RuntimeError("a worker died") from error


# What is called at each moment, by module and name.
MOMENTS = {
    "reading the study": ("evals.study", "load_study"),
    "loading": ("evals.running.jobs", "load_members"),
    "a training step": ("finetune.checkpoints", "Checkpoints.on_step_end"),
    "saving the result": ("finetune.tuning", "publish"),
    "after tuning": ("evals.running.jobs", "tuning_summary"),
    "writing a record": ("evals.records", "_filled"),
    "drawing": ("evals.commands.compare", "draw_chart"),
}


def prepare(monkeypatch: pytest.MonkeyPatch, moment: str, act: Callable[[], None]) -> None:
    module, name = MOMENTS[moment]
    place: Any = importlib.import_module(module)
    *owner, name = name.split(".")
    for part in owner:
        place = getattr(place, part)
    monkeypatch.setattr(place, name, once(getattr(place, name), act))


def leftovers(out: Path) -> list[str]:
    """Files and folders that are no results: of a run that stopped before its first checkpoint nothing is kept.

    The system's lock is on an open file: the empty file that stays behind locks nothing.
    """
    found = [place for place in out.rglob("*") if place.name.startswith(".") or "partial" in place.name]
    return [str(place) for place in found if not (place.name == LOCK or place.suffix == ".lock") or place.stat().st_size or is_held(place)]


def is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    "moment", [name if name in ("a training step", "writing a record") else pytest.param(name, marks=pytest.mark.slow) for name in MOMENTS]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_it_goes_on(
    study: tuple[Path, Path], moment: str, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = study
    with monkeypatch.context() as patched:
        prepare(patched, moment, lambda: send(number))
        assert run_main(monkeypatch, "compare", path, "--jobs", 1, "--out", out) == 128 + number
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == LINE
    assert "Traceback" not in said.err
    assert said.out == ""
    assert leftovers(out) == []
    assert not (out / "results.json").exists()
    cli._received.clear()
    assert run_main(monkeypatch, "compare", path, "--jobs", 1, "--out", out, "--format", "json") == 0
    said = capsys.readouterr()
    assert LINE not in said.err
    assert {row["arm"] for row in json.loads(said.out)["costs"]} == {"base", "full"}
    assert leftovers(out) == []


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("again", [True, False], ids=["sent again", "dropped"])
def test_a_signal_within_a_del_is_not_lost(
    study: tuple[Path, Path], number: int, again: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The negative twin: were it dropped, the run would go on to its end."""
    path, out = study
    if not again:
        monkeypatch.setattr(cli, "_send_again", lambda dropped: None)
    prepare(monkeypatch, "after tuning", lambda: while_collecting(number))
    assert run_main(monkeypatch, "compare", path, "--jobs", 1, "--out", out) == 128 + number
    assert (out / "results.json").exists() == (not again)
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == LINE
    assert "Exception ignored" not in said


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("act", [swallowing, wrapping])
def test_a_signal_that_a_library_catches_is_the_end_all_the_same(
    study: tuple[Path, Path], act: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = study
    prepare(monkeypatch, "loading", lambda: act(signal.SIGTERM))
    assert run_main(monkeypatch, "compare", path, "--jobs", 1, "--out", out) == 143
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == LINE
    assert "worker died" not in said


@pytest.mark.usefixtures("alone")
def test_errors_are_what_they_were(study: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a signal: an error is one line and 2, a fault of ours a traceback, an exception in a `__del__` is told."""
    assert run_main(monkeypatch, "compare", study[0].with_name("nothing.yaml")) == 2
    assert capsys.readouterr().err.startswith("proxytune: error: ")
    monkeypatch.setattr("evals.study.load_study", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()

    class Faulty:
        def __del__(self) -> None:
            raise ArithmeticError("told")

    Faulty()
    assert "told" in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_a_family_that_is_not_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    smallest = replace(RECIPES["tiny"].small, layers=1, hidden=8, heads=1, epochs=1, batch_size=200)
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], base=smallest, small=smallest))
    monkeypatch.setattr(Display, "on_step_end", once(Display.on_step_end, lambda: send(signal.SIGTERM)))
    assert run_main(monkeypatch, "world", "build", "tiny", "--out", tmp_path) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "proxytune: stopped"  # it begins again
    assert list((tmp_path / "tiny").iterdir()) == []


SCRIPT = """
import os, sys
sys.path[:0] = {paths!r}
import helpers
from evals import cli
import finetune.tuning
moment = {moment!r}
if moment == "collecting":
    finetune.tuning.gc = type("gc", (), {{"collect": staticmethod(lambda: helpers.while_collecting({number}))}})
else:
    from finetune.checkpoints import Checkpoints
    Checkpoints.on_step_end = helpers.once(Checkpoints.on_step_end, lambda: helpers.send({number}))
cli.main()
"""


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("collecting", signal.SIGINT),
        pytest.param("collecting", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("step", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_process_on_a_terminal_ends_by_its_signal_with_its_bar_closed(study: tuple[Path, Path], moment: str, number: int) -> None:
    path, out = study
    script = SCRIPT.format(paths=PATHS, moment=moment, number=int(number))
    screen, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, "compare", path, "--jobs", "1", "--out", out], stderr=terminal, stdout=subprocess.PIPE, env=environment
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(screen, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(screen)
    assert process.communicate()[0] == b""
    assert process.returncode == 128 + number, shown[-2000:]
    text = shown.decode()
    assert text.rstrip().splitlines()[-1].endswith(LINE)  # after what clears the bar
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back
    assert "Traceback" not in text
    assert leftovers(out) == []
