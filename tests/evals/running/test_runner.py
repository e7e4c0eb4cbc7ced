"""The runner: the same bytes in one process and in two, after a kill, and beside another command; one line for what goes wrong."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from helpers import PATHS, make_model, make_tokenizer, run_command

from evals.kinds import ArmSetting
from evals.measures.answers import Generated
from evals.records import read_record
from evals.running import runner
from evals.running.jobs import Place, Read, tuning_of
from evals.running.outlook import look_at
from evals.running.plan import plan
from evals.running.progress import Display
from evals.running.runner import LOCK, run_study, workers_for
from evals.selection import Choice, Choices
from evals.study import Study, load_study, run
from finetune.pretraining import Pretraining
from finetune.recipe import Tuning
from probes.world.recipes import RECIPES
from proxytune.errors import UserError

TUNING = {"method": "full", "learning_rate": 3e-3, "epochs": 1, "batch_size": 8}
LORA = TUNING | {"method": "lora", "rank": 2}
STUDY: dict[str, Any] = {
    "study": "small",
    "models": {"base": "base", "small": "small"},
    "data": {"train": "train.jsonl", "test": "test.jsonl", "knowledge": "test.jsonl", "prompt": "{question}", "new_tokens": 3},
    "measures": ["task", "knowledge"],
    "contrasts": [["full", "proxy@1"]],
    "arms": {
        "base": {"kind": "base"},
        "expert": {"kind": "expert", "tuning": TUNING},
        "proxy": {"kind": "proxy", "alpha": [0.5, 1]},
        "full": {"kind": "direct", "tuning": TUNING},
        "best": {"kind": "direct", "tuning": LORA, "sweep": {"learning_rate": [1e-3, 1e-1]}, "select": "best"},
        "matched": {"kind": "direct", "tuning": LORA, "sweep": {"learning_rate": [1e-3, 1e-1]}, "select": {"match": "full"}},
    },
}


def write_items(path: Path, numbers: range) -> None:
    rows = [{"question": f"w{n} w{n + 1}", "statement": f"w{n + 1} w{n}", "answer": f"w{n + 2}"} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_study(folder: Path, name: str = "study", **changes: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, their items and the study."""
    folder = tmp_path_factory.mktemp("runner")
    for name, seed, layers in (("base", 1, 3), ("small", 2, 2)):
        make_model(seed=seed, layers=layers).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    write_items(folder / "train.jsonl", range(3, 27))
    write_items(folder / "test.jsonl", range(30, 46))
    write_study(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(place: Path) -> dict[str, bytes]:
    """What the study leaves in one process, in the folder `one`."""
    done = run_command("compare", place / "study.yaml", "--jobs", 1, "--out", place / "one", "--full")
    assert done.returncode == 0, done.stderr
    return content(place / "one") | {"tables": without_times(done.stdout)}


def content(out: Path) -> dict[str, bytes]:
    """Results and records; what a machine measured (costs.json) differs from run to run."""
    found = {name: (out / name).read_bytes() for name in ("results.json", "items.parquet")}
    for file in sorted((out / "records").iterdir()):
        record = read_record(out / "records", file.stem)
        assert record is not None
        items, provenance = record
        found[f"records/{file.name}"] = items.to_csv().encode() + json.dumps(provenance, sort_keys=True).encode()
    return found


def without_times(tables: str) -> bytes:
    """The tables but for the last one, of the costs, which has seconds."""
    return tables[: tables.index("Cost")].encode()


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*")}


# --- processes ---


def test_two_processes_leave_the_same_bytes_as_one(place: Path, unbroken: dict[str, bytes]) -> None:
    done = run_command("compare", place / "study.yaml", "--jobs", 2, "--out", place / "two", "--full")
    assert done.returncode == 0, done.stderr
    assert content(place / "two") | {"tables": without_times(done.stdout)} == unbroken
    assert "selected" in done.stderr and "· base · task: read" in done.stderr
    assert sorted(path.name for path in (place / "two" / "checkpoints").glob("[!.]*")) == sorted(
        path.name for path in (place / "one" / "checkpoints").glob("[!.]*")
    )


def test_an_error_in_a_worker_is_the_line_that_it_is_in_one_process(place: Path, tmp_path: Path) -> None:
    """Found when the job loads what was tuned beforehand."""
    (tmp_path / "broken").mkdir()
    arms = {"base": {"kind": "base"}, "given": {"kind": "direct", "path": str(tmp_path / "broken")}}
    study = write_study(place, "broken", arms=arms, contrasts=[])
    said = []
    for jobs in (1, 2):
        failed = run_command("compare", study, "--jobs", jobs, "--out", tmp_path / f"out-{jobs}")
        assert (failed.returncode, failed.stdout) == (2, "")
        assert "Traceback" not in failed.stderr
        said.append(failed.stderr.splitlines()[-1])
    assert said[0] == said[1]
    assert said[0].startswith("proxytune: error: arms.given.path: ")


def faulty(*_: object) -> None:
    raise ZeroDivisionError("ours")


def die(*_: object) -> None:
    os._exit(1)


def test_a_fault_of_ours_in_a_worker_is_no_mistake_of_a_user(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative twin; and a worker that is gone is one line."""
    study, folder = load_study(place / "study.yaml")
    for act, error, words in ((faulty, ZeroDivisionError, "ours"), (die, UserError, "jobs: a process has died, .*--jobs 1, it continues")):
        monkeypatch.setattr(runner, "_perform_there", act)
        with pytest.raises(error, match=words), Display() as display:
            run_study(study, folder, tmp_path / "out", display, jobs=2)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_a_job_do_not_depend_on_the_number_of_processes(
    place: Path, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, folder = load_study(write_study(place, "threads", threads=threads))
    seen: list[int] = []

    def perform(*_: object) -> Read:
        seen.append(torch.get_num_threads())
        return Read((), {})

    monkeypatch.setattr(runner, "perform", perform)
    with Display() as display:
        run_study(study, folder, tmp_path / "out", display, jobs=1)
    assert set(seen) == {threads}
    submit = runner.ProcessPoolExecutor.submit
    monkeypatch.setattr(runner.ProcessPoolExecutor, "submit", lambda executor, *_: submit(executor, torch.get_num_threads))
    ended: runner.Ended = SimpleQueue()
    with Display() as display, runner._in_processes(Place(study, folder, tmp_path), ended, display, 2) as start:
        for job in plan(study)[:3]:
            start(job, {})
        assert [ended.get()()[1] for _ in range(3)] == [threads] * 3


def test_large_members_are_worked_with_one_job_at_a_time(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, folder = load_study(place / "study.yaml")
    said: list[str] = []
    small = runner.count_parameters(str(place / "base")) + runner.count_parameters(str(place / "small"))
    assert small == sum(parameter.numel() for name, layers in (("base", 3), ("small", 2)) for parameter in make_model(layers=layers).parameters())
    monkeypatch.setattr(runner, "SMALL", small)
    assert workers_for(study, small, 2, 9, said.append) == 2
    assert not said
    monkeypatch.setattr(runner, "SMALL", small - 1)
    assert workers_for(study, small, 2, 9, said.append) == 1
    (line,) = said
    assert line.startswith(f"--jobs 2: the members have {small:,} parameters together, more than {small - 1:,}; one job runs at a time")
    assert workers_for(study, small, None, 9, said.append) == 1
    assert len(said) == 1  # nobody asked for more
    monkeypatch.setattr(runner, "_in_processes", None)
    tiny, _ = load_study(write_study(place, "tiny", arms={"base": {"kind": "base"}}, measures=["task"], contrasts=[]))
    with Display() as display:
        run_study(tiny, folder, tmp_path / "out", display, jobs=2)


def test_processes_are_as_many_as_cores_for_their_threads_and_no_more_than_jobs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, _ = load_study(place / "study.yaml")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    threads = {number: study.model_copy(update={"threads": number}) for number in (1, 3, 16)}
    assert [workers_for(threads[number], 0, None, 99, pytest.fail) for number in (1, 3, 16)] == [8, 2, 1]
    assert workers_for(threads[1], 0, None, 5, pytest.fail) == 5
    assert workers_for(threads[1], 0, 20, 99, pytest.fail) == 20


# --- one command in a folder ---


def test_a_second_command_stops_with_one_line_or_waits(place: Path, unbroken: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    study, out = place / "study.yaml", place / "one"
    monkeypatch.setattr(Generated, "read", None)  # all is there
    held = os.open(out / LOCK, os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        before = tree(out)
        refused = run_command("compare", study, "--jobs", 1, "--out", out)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.splitlines() == [
            f"proxytune: error: out: another command is running in '{out}'; wait for it, add --wait, or choose another folder"
        ]
        assert tree(out) == before
        released: list[float] = []
        thread = threading.Timer(1.0, lambda: (released.append(time.monotonic()), os.close(held)))
        thread.start()
        done = run_command("compare", study, "--jobs", 1, "--out", out, "--wait", "--full")
        thread.join()
    finally:
        if not released:
            os.close(held)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() > released[0]
    assert content(out) | {"tables": without_times(done.stdout)} == unbroken


def test_a_link_in_the_place_of_the_lock_is_not_followed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / LOCK).symlink_to(tmp_path / "secret")
    refused = run_command("compare", place / "study.yaml", "--jobs", 1, "--out", tmp_path)
    assert (refused.returncode, refused.stdout, len(refused.stderr.splitlines())) == (2, "", 1)
    assert refused.stderr.startswith(f"proxytune: error: out: '{tmp_path}' cannot be written")
    assert (tmp_path / "secret").read_text() == "secret"


# --- what a kill leaves ---


def start(*arguments: object) -> subprocess.Popen[str]:
    """A process in a session of its own, as a terminal's."""
    command = [sys.executable, "-m", "evals.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)


def of_session(session: int) -> dict[int, str]:
    """The processes of a session that are not yet gone, with their command lines."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has just ended
            continue
    return found


def wait_until(holds: Callable[[], object], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def at_work(process: subprocess.Popen[str], out: Path) -> bool:
    """Whether some records are there and not all."""
    assert process.poll() is None, process.communicate()
    return any(out.glob("records/*.parquet"))


def test_a_killed_parent_leaves_no_worker_and_no_lock_and_the_command_goes_on(place: Path, unbroken: dict[str, bytes]) -> None:
    study, out = place / "study.yaml", place / "killed"
    process = start("compare", study, "--jobs", 2, "--out", out)
    assert wait_until(lambda: at_work(process, out))
    assert len(of_session(process.pid)) > 2  # it and its workers
    process.kill()  # this one alone
    process.communicate()
    assert wait_until(lambda: not of_session(process.pid), 10), of_session(process.pid)
    with FileLock(out / LOCK, timeout=0):
        pass
    kept = {path.name for path in (out / "records").iterdir()}
    assert kept < {Path(name).name for name in unbroken if name.startswith("records")}
    done = run_command("compare", study, "--jobs", 2, "--out", out, "--full")
    assert done.returncode == 0, done.stderr
    assert content(out) | {"tables": without_times(done.stdout)} == unbroken
    assert "from its record" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_processes_with_one_line(place: Path, tmp_path: Path, number: int) -> None:
    """Ctrl-C goes to all processes of the terminal, SIGTERM to the one that was started."""
    process = start("compare", place / "study.yaml", "--jobs", 2, "--out", tmp_path / "out")
    assert wait_until(lambda: at_work(process, tmp_path / "out"))
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (128 + number, "")
    assert said.splitlines()[-1] == "proxytune: stopped; run the same command again, it continues"
    assert "Traceback" not in said and "Error" not in said
    assert wait_until(lambda: not of_session(process.pid), 10), of_session(process.pid)


# --- what there is to do ---


def plan_of(*arguments: object) -> dict[str, dict[str, str]]:
    done = run_command("compare", *arguments, "--plan", "--format", "json")
    assert done.returncode == 0, done.stderr
    return {row["job"]: row for row in json.loads(done.stdout)["jobs"]}


def test_the_plan_says_what_is_there_and_writes_nothing(place: Path, unbroken: dict[str, bytes], tmp_path: Path) -> None:
    study = place / "study.yaml"
    loaded, folder = load_study(study)
    with Display() as display:
        before = {one.job.name: one for one in look_at(Place(loaded, folder, tmp_path / "out"), display)}
    assert not (tmp_path / "out").exists()
    assert list(before) == [job.name for job in plan(loaded)]
    tune, read, later = (before[f"seed 0 · {name}"] for name in ("tune full", "read base", "tune best"))
    assert (tune.there, read.there, later.there) == ("none", "0 of 2 records", "none")
    assert tune.tokens > 24 * 3 and read.tokens > 0 and tune.seconds > 0 and read.seconds > 0  # type: ignore[operator]
    assert (later.tokens, later.seconds) == (None, None)  # it waits for what is not there
    kept = tree(place / "one")
    after = plan_of(study, "--out", place / "one")
    assert {row["there"] for row in after.values()} == {"all"}
    assert list(after) == list(before)
    assert tree(place / "one") == kept
    shown = run_command("compare", study, "--plan", "--out", place / "one").stdout
    assert f"{len(after)} jobs, 0 to do: about 0 seconds" in " ".join(shown.split())
    out = shutil.copytree(place / "one", tmp_path / "partly")
    for name in ("records", "checkpoints"):
        for there in (out / name).glob("[!.]*"):
            shutil.rmtree(there) if there.is_dir() else there.unlink()
        todo = [row["there"] for row in plan_of(study, "--out", out).values() if row["there"] != "all"]
        assert ("0 of 2 records" in todo) and ("none" in todo)


def test_a_tuning_takes_the_selection_that_it_waits_for(place: Path) -> None:
    """Whatever has been selected in other runs by then."""
    jobs = {job.name: job for job in plan(load_study(place / "study.yaml")[0].model_copy(update={"seeds": (0, 1)}))}
    tunings = {arm: Tuning(method="full", learning_rate=rate) for arm, rate in (("best", 1.0), ("matched", 2.0))}
    chosen = Choices({arm: Choice(arm, arm, ArmSetting(arm, "direct", arm), tuning, {}) for arm, tuning in tunings.items()})
    outcomes = dict.fromkeys(jobs) | {"seed 1 · select": Choices(), "seed 0 · select": chosen}
    assert {arm: tuning_of(jobs[f"seed 0 · tune {arm}"], outcomes) for arm in tunings} == tunings
    assert tuning_of(jobs["seed 0 · tune full"], outcomes) == Tuning(**TUNING)


# --- several worlds ---


def test_two_worlds_are_two_runs_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretraining = Pretraining(layers=1, hidden=8, heads=1, learning_rate=1e-2, epochs=1, block=24, batch_size=500)
    for name, exposures in (("one", (0, 3)), ("other", (0, 5))):
        monkeypatch.setitem(RECIPES, name, replace(RECIPES["tiny"], exposures=exposures, base=pretraining, small=pretraining))
    content = {
        "study": "two",
        "worlds": ["one", "other"],
        "batch_size": 200,
        "measures": ["task"],
        "arms": {"base": {"kind": "base"}, "full": {"kind": "direct", "tuning": TUNING | {"batch_size": 64}}},
    }
    study = Study.model_validate(content)
    with Display() as display:
        done = run_study(study, Path(), tmp_path, display, jobs=1)
    assert [(record.arm, record.world, record.seed) for record in done.records] == [
        (arm, world, 0) for arm in ("base", "full") for world in ("one", "other")
    ]
    assert len({record.protocol for record in done.records}) == 2  # other people, other questions
    assert {arm: len(costs) for arm, costs in done.costs.items()} == {"base": 2, "full": 2}
    assert sorted(path.name for path in (tmp_path / "worlds").glob("[!.]*")) == ["one", "other"]
    results = run(study, tmp_path)
    assert (results.header.worlds, results.header.runs) == (("one", "other"), 2)
    alone = {world: run(study.model_copy(update={"worlds": (world,)}), tmp_path) for world in ("one", "other")}
    value = {name: {row["arm"]: row["value"] for row in found.rows} for name, found in (alone | {"both": results}).items()}
    counts = {name: {row["arm"]: row["n"] for row in found.rows} for name, found in (alone | {"both": results}).items()}
    for arm in ("base", "full"):
        assert counts["both"][arm] == counts["one"][arm] + counts["other"][arm]
        assert value["both"][arm] == pytest.approx((value["one"][arm] + value["other"][arm]) / 2)
