"""Checkpoints inside a run: whole or not at all, of sound weights only, and what was counted up to them."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.costs import Meter
from proxytune.errors import UserError

WHOLE = "whole.json"  # written last: a checkpoint without it was interrupted


class Checkpoints(TrainerCallback):
    """Asks for a checkpoint every so many seconds, marks those that are whole, and stops a run that has broken.

    Raises `UserError` at the first step whose loss or gradient is not finite, before anything of it is saved.
    """

    def __init__(self, every_seconds: float, meter: Meter):
        self._every, self._meter = every_seconds, meter
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._meter.tick()
        due = torch.tensor(time.monotonic() - self._last >= self._every, device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(due, 0)  # all processes save together
        if due:
            control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: object) -> None:
        for name, word in (("loss", "loss"), ("grad_norm", "gradient"), ("eval_loss", "validation loss")):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"learning_rate: the {word} is not finite at step {state.global_step} with {args.learning_rate:g}; lower it")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_: object) -> None:
        self._last = time.monotonic()
        assert model is not None
        if not state.is_world_process_zero or not all(parameter.isfinite().all() for parameter in model.parameters()):
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in folder.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        self._meter.tick()
        partial = folder / f"{WHOLE}.partial"
        partial.write_text(json.dumps(asdict(self._meter)))
        partial.replace(folder / WHOLE)


def last_whole(folder: Path) -> tuple[Path | None, Meter]:
    """The latest whole checkpoint in a folder and the meter as it stood there; what was interrupted is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda place: int(place.name.removeprefix("checkpoint-")))
    whole = [place for place in found if (place / WHOLE).exists()]
    for place in set(found) - set(whole):
        shutil.rmtree(place, ignore_errors=True)  # another process of the run may be at it too
    if not whole:
        return None, Meter()
    return whole[-1], Meter(**json.loads((whole[-1] / WHOLE).read_text()))


def is_main_process() -> bool:
    """Whether this is the one process of a launcher that writes and speaks."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def workplace(out: Path, key: str) -> Iterator[Path]:
    """The folder of a run's checkpoints, beside `out`; it is kept if the run stops with a whole one in it.

    Raises `UserError` where it belongs to another run: a running one, or one of other weights, data, settings or seed.
    """
    folder = out.parent / f".{out.name}.partial"
    main = is_main_process()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock", timeout=0)
    try:
        if main:
            lock.acquire()
    except Timeout as error:
        raise UserError(f"out: another process is tuning into '{out}'; wait for it or choose another folder") from error
    try:
        owner = folder / "run"
        if owner.exists() and owner.read_text() != key and last_whole(folder)[0] is not None:
            raise UserError(f"out: '{folder}' holds the checkpoints of another run (weights, data, settings or seed differ); remove it")
        if main:
            owner.write_text(key)
        yield folder
    except BaseException:
        lock.release()
        if main and last_whole(folder)[0] is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    lock.release()
    if main:
        shutil.rmtree(folder)
