"""What happens to a tuning when it is stopped, when its disk is full and when its numbers break."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from helpers import PATHS, TUNINGS, Stop, fingerprint, make_model, run_tuning, save_models, unbroken_tuning
from transformers import TrainerCallback

from finetune.checkpoints import METER, last_whole
from finetune.encoding import check_rows
from finetune.items import Item
from finetune.recipe import Tuning, TuningRun
from finetune.tuning import tune
from proxytune import UserError
from proxytune.digests import seal


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [*((recipe, {"full": (1, 4, 6), "steps": (7,)}.get(recipe, (4,))) for recipe in TUNINGS)]
    + [pytest.param(recipe, tuple(range(1, 10 if recipe == "full" else 7)), marks=pytest.mark.slow) for recipe in TUNINGS],
)
def test_a_stopped_run_goes_on_to_the_same_bits(folder: Path, recipe: str, steps: tuple[int, ...]) -> None:
    options = TUNINGS[recipe]
    unbroken, right = unbroken_tuning(recipe)
    assert unbroken.steps > 6
    for step in steps:
        name = f"stopped-{step}"
        with pytest.raises(KeyboardInterrupt):
            run_tuning(folder, name, Stop(step), **options)
        assert not (folder / name).exists()
        resumed = run_tuning(folder, name, **options)
        assert resumed.losses == unbroken.losses
        assert resumed.validation_losses == unbroken.validation_losses
        assert (resumed.tokens, resumed.flops, resumed.steps) == (unbroken.tokens, unbroken.flops, unbroken.steps)
        assert fingerprint(folder, name) == right
    assert not list(folder.glob(".*partial"))


def test_a_run_that_begins_again_at_another_place_would_differ(folder: Path) -> None:
    """The negative twin: without its optimizer's state a run goes on differently."""
    unbroken, _ = unbroken_tuning()
    with pytest.raises(KeyboardInterrupt):
        run_tuning(folder, "out", Stop(4))
    checkpoint, _ = last_whole(folder / ".out.partial")
    assert checkpoint is not None
    (checkpoint / "optimizer.pt").unlink()
    seal(checkpoint)
    assert run_tuning(folder, "out").losses != unbroken.losses


def test_two_kills_in_a_row_and_an_interrupted_checkpoint(folder: Path) -> None:
    unbroken, right = unbroken_tuning()
    for step in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            run_tuning(folder, "out", Stop(step))
    partial = folder / ".out.partial"
    seconds = json.loads((partial / "checkpoint-7" / METER).read_text())["seconds"]
    (partial / "checkpoint-7" / METER).unlink()
    (partial / "checkpoint-7" / "model.safetensors").write_bytes(b"torn")
    resumed = run_tuning(folder, "out")
    assert resumed.losses == unbroken.losses
    assert fingerprint(folder, "out") == right
    assert resumed.seconds > 0 < seconds


SCRIPT = """
import sys, pathlib
sys.path[:0] = {paths!r}
from helpers import run_tuning
run_tuning(pathlib.Path({folder!r}), "out", epochs=4.0)
"""


def test_a_killed_process_goes_on_to_the_same_bits(folder: Path) -> None:
    unbroken, right = unbroken_tuning(epochs=4.0)
    script = SCRIPT.format(paths=PATHS, folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not list((folder / ".out.partial").glob(f"checkpoint-[3-9]/{METER}")) and time.monotonic() - began < 60:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "out").exists()
    assert run_tuning(folder, "out", epochs=4.0).losses == unbroken.losses
    assert fingerprint(folder, "out") == right


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As on a full disk: what writes more into a file gets an error."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_and_keeps_the_last_good_checkpoint(folder: Path) -> None:
    unbroken, _ = unbroken_tuning(epochs=4.0)
    with pytest.raises(KeyboardInterrupt):
        run_tuning(folder, "out", Stop(3), epochs=4.0)
    largest = (folder / "small" / "model.safetensors").stat().st_size // 2
    with files_no_larger_than(largest), pytest.raises(UserError, match=r"^out: .*free some space") as stopped:
        run_tuning(folder, "out", epochs=4.0)
    assert "\n" not in str(stopped.value)
    assert last_whole(folder / ".out.partial")[0] == folder / ".out.partial" / "checkpoint-3"
    assert run_tuning(folder, "out", epochs=4.0).losses == unbroken.losses


class Break(TrainerCallback):
    """Puts a NaN into the weights after a step, as an overflow would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = torch.nan


def test_broken_numbers_stop_the_run_and_keep_the_last_good_checkpoint(folder: Path) -> None:
    with pytest.raises(UserError, match=r"not finite at step \d with"):
        run_tuning(folder, "out", Break(4))
    assert last_whole(folder / ".out.partial")[0] == folder / ".out.partial" / "checkpoint-3"
    unbroken, _ = unbroken_tuning()
    assert run_tuning(folder, "out").losses == unbroken.losses


def test_a_run_that_breaks_before_its_first_checkpoint_leaves_nothing(folder: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        run_tuning(folder, "out", Break(1), every=1e9)
    assert not list(folder.glob("*out*"))
    assert not list(folder.glob(".*out*"))


def test_checkpoints_of_another_run_are_refused(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_tuning(folder, "out", Stop(3))
    with pytest.raises(UserError, match="checkpoints of another run"):
        run_tuning(folder, "out", learning_rate=1e-4)
    run_tuning(folder, "out")


def test_what_may_be_resumed_does_not_depend_on_where_anything_stands(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Start, base, checkpoints and result, all of them elsewhere. A run that began again would stop at once."""
    unbroken = run_tuning(folder, "unbroken", every=1e9, consistent=1.0)
    with pytest.raises(KeyboardInterrupt):
        run_tuning(folder, "out", Stop(3), consistent=1.0)
    moved = folder.rename(tmp_path_factory.mktemp("elsewhere") / "moved")
    assert run_tuning(moved, "out", Stop(0), consistent=1.0).losses == unbroken.losses
    assert fingerprint(moved, "out") == fingerprint(moved, "unbroken")


@pytest.mark.parametrize("name", ["small", "base"])
def test_other_weights_at_the_same_place_are_not_resumed(folder: Path, name: str) -> None:
    """The negative twin."""
    with pytest.raises(KeyboardInterrupt):
        run_tuning(folder, "out", Stop(3), consistent=1.0)
    make_model(seed=9, layers=4, hidden={"small": 32, "base": 48}[name]).save_pretrained(folder / name)
    with pytest.raises(UserError, match="checkpoints of another run"):
        run_tuning(folder, "out", consistent=1.0)


def test_two_processes_do_not_tune_into_one_folder(folder: Path) -> None:
    (folder / ".out.partial").mkdir()
    with FileLock(folder / ".out.partial" / "lock"), pytest.raises(UserError, match="another process is tuning"):
        run_tuning(folder, "out")
    run_tuning(folder, "out")


def test_a_dead_adapter_is_flagged(folder: Path) -> None:
    with pytest.raises(UserError, match="the adapter is dead"):
        run_tuning(folder, "out", method="lora", rank=2, learning_rate=1e-60)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("options", [{}, {"method": "lora", "rank": 2}])
def test_a_last_step_that_breaks_the_weights_is_flagged(folder: Path, options: dict[str, Any]) -> None:
    """Neither its loss nor its gradient is anything but finite."""
    with pytest.raises(UserError, match=r"the weights are not finite after the last step with 1e\+300"):
        run_tuning(folder, "out", learning_rate=1e300, batch_size=64, epochs=1.0, every=1e9, **options)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1]}, {"input_ids": [3, 4, 50], "completion_mask": [0, 0, 1]}],
            "example 2 .* id 50 outside",
        ),
        ([{"input_ids": [3, 4, 5], "completion_mask": [0, 0, 1]}, {"input_ids": [3, 4, 5], "completion_mask": [0, 0, 0]}], "nothing of example 2"),
        ([{"input_ids": [3] * 9, "completion_mask": [0] * 8 + [1]}], "example 1 has 9 tokens, .* is 8"),
        ([{"prompt_ids": [3] * 7, "chosen_ids": [3], "rejected_ids": [3, 4]}], "example 1 has 9 tokens"),
        ([{"input_ids": [3, 4], "completion_mask": [0, 0]}], "none of the 2 tokens"),
    ],
)
def test_examples_that_do_not_fit_are_named(rows: list[dict[str, list[int]]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_rows(rows, 8, 50)
    check_rows([{"input_ids": [3, 4, 49], "completion_mask": [0, 0, 1]}], 8, 50)


def test_an_example_longer_than_the_window_is_an_error_and_no_cut(folder: Path) -> None:
    long = [Item(question=" ".join(["w5"] * 130), answer="w6")]
    with pytest.raises(UserError, match="window of the model is 128"):
        tune(TuningRun(folder / "small", long, Tuning(method="full", learning_rate=1e-3), prompt="{question}", ending="", seed=0, out=folder / "out"))


TORCHRUN = """
import json, pathlib, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from helpers import run_tuning
said = {{}}
for name, options in {cases!r}.items():
    try:
        report = run_tuning(pathlib.Path({folder!r}), name, every=1e9, **options)
        said[name] = f"{{report.processes}} {{report.wrapped}}"
    except ValueError as error:
        said[name] = f"error: {{error}}"
if torch.distributed.get_rank() == 0:
    pathlib.Path({folder!r}, "said.json").write_text(json.dumps(said))
"""
SHARED_OUT: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"method": "lora", "rank": 2},
    "consistent": {"consistent": 1.0},
    "five": {"batch_size": 5},
    "fsdp": {"fsdp": True},
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder in which two processes, started once, ran all these tunings, and what they said of each."""
    place = tmp_path_factory.mktemp("two")
    save_models(place)
    (place / "script.py").write_text(TORCHRUN.format(paths=PATHS, folder=str(place), cases=SHARED_OUT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(place / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return place, json.loads((place / "said.json").read_text())


@pytest.mark.parametrize("case", ["full", "lora", "consistent"])
def test_two_processes_train_to_the_loss_of_one(folder: Path, two_processes: tuple[Path, dict[str, str]], case: str) -> None:
    place, said = two_processes
    options = SHARED_OUT[case]
    one = run_tuning(folder, "one", every=1e9, **options)
    assert said[case] == "2 DistributedDataParallel"
    two = json.loads((place / case / "tuning.json").read_text())["report"]
    assert two["losses"] == pytest.approx(one.losses, abs=1e-4)
    assert (two["steps"], two["tokens"]) == (one.steps, one.tokens)
    other = run_tuning(folder, "other", every=1e9, **(options | {"batch_size": 2}))
    assert other.losses[: one.steps] != pytest.approx(one.losses, abs=1e-2)


def test_launchers_that_fall_back_are_errors(folder: Path, two_processes: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, said = two_processes
    assert said["five"].startswith("error: ") and "5 examples per step cannot be divided among 2" in said["five"]
    assert said["fsdp"].startswith("error: ") and "fsdp: the model is wrapped as DistributedDataParallel, not sharded" in said["fsdp"]
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_MIXED_PRECISION", "no")
        patched.delenv("WORLD_SIZE", raising=False)
        with pytest.raises(UserError, match="accelerate launch started a single process"):
            run_tuning(folder, "out")
    with pytest.raises(UserError, match="fsdp: one process cannot shard a model"):
        run_tuning(folder, "out", fsdp=True)


class Trap:
    """A pickle that would run code when it is read."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_cannot_run_code(folder: Path, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_tuning(folder, "out", Stop(3))
    checkpoint, _ = last_whole(folder / ".out.partial")
    assert checkpoint is not None
    torch.save(Trap(folder / "sprung"), checkpoint / name)
    seal(checkpoint)  # by someone who knows how
    if name == "training_args.bin":
        run_tuning(folder, "out")  # nothing reads it
    else:
        with pytest.raises(UserError, match=r"out: the checkpoint '.*' cannot be read as plain tensors; remove it"):
            run_tuning(folder, "out")
    assert not (folder / "sprung").exists()
    torch.load(checkpoint / name, weights_only=False) if name != "training_args.bin" else None
    assert (folder / "sprung").exists() == (name != "training_args.bin")  # the trap itself works
