"""Checkpoints of a run: complete or absent, with finite weights only, and with the costs counted so far."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune.meter import Meter
from proxytune.digests import DIGESTS, find_damage, seal
from proxytune.errors import UserError
from proxytune.member import Member

STEPS = "steps"  # the folder in a result that holds the model as it was on the way
METER = "meter.json"  # the costs counted up to a checkpoint
logger = logging.getLogger("proxytune")


class Checkpoints(TrainerCallback):
    """Saves a checkpoint every `every_seconds`, seals complete ones, and stops a run whose numbers are not finite.

    Once a new checkpoint is sealed, older ones are removed, except the best one, or the last but one where no best one is sought. Raises
    `UserError` at the first step whose loss or gradient is not finite, before anything of that step is saved.
    """

    def __init__(self, every_seconds: float, meter: Meter):
        self._every, self._meter = every_seconds, meter
        self._last = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        best = _best(Path(args.output_dir), state)
        # The path in a loaded state is that of the process that wrote it, which may have run in another folder.
        state.best_model_checkpoint = None if best is None else str(best)

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
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # the other processes write their own random state
        if not state.is_world_process_zero or not all(parameter.isfinite().all() for parameter in model.parameters()):
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._meter.tick()
        (folder / METER).write_text(json.dumps(asdict(self._meter)))
        seal(folder)
        found = _by_age(folder.parent)
        best = _best(folder.parent, state)
        for checkpoint in set(found) - (set(found[-2:]) if best in (None, *found[-2:]) else {best, found[-1]}):
            _remove(checkpoint)


class KeepSteps(TrainerCallback):
    """Keeps the model (of a LoRA tuning: the adapter) as it is after each of `steps`, as model folders `folder`/step-N.

    A run that continues from a checkpoint writes those after it again, with the same bytes. Not covered: several processes.
    """

    def __init__(self, folder: Path, steps: Sequence[int], member: Member) -> None:
        self._folder, self._steps, self._tokenizer = folder, steps, member.tokenizer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: object) -> None:
        if state.global_step in self._steps and state.is_world_process_zero:
            for part in (model, self._tokenizer):
                part.save_pretrained(self._folder / f"step-{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        late = [step for step in self._steps if step > state.global_step]
        if late:
            raise UserError(f"keep: there is no step {late[0]}, tuning ended after {state.global_step}; name a step before the last")


def last_whole(folder: Path) -> tuple[Path | None, Meter]:
    """The latest checkpoint in a folder from which a run continues as if it had not stopped, and its meter.

    It is complete, and so is the best one before it where a best one is sought. Later ones are removed: they were interrupted, or
    are damaged, which is logged as a warning.
    """
    for checkpoint in reversed(_by_age(folder)):
        damage = find_damage(checkpoint)
        if damage is None:
            best = _best(folder, TrainerState.load_from_json(str(checkpoint / "trainer_state.json")))
            if best is not None and best != checkpoint and (lost := find_damage(best)) is not None:
                damage = f"the best checkpoint before it, {best.name}: {lost}"
            else:
                return checkpoint, Meter(**json.loads((checkpoint / METER).read_text()))
        if is_main_process():  # the other processes look at the same time and find the same
            if (checkpoint / DIGESTS).exists():  # without digests it was only interrupted
                logger.warning("the checkpoint '%s' is damaged (%s); the run continues from an earlier one or starts again", checkpoint, damage)
            _remove(checkpoint)
    return None, Meter()


def _by_age(folder: Path) -> list[Path]:
    """The checkpoints of a folder, complete or not, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.removeprefix("checkpoint-")))


def _best(folder: Path, state: TrainerState) -> Path | None:
    """The best checkpoint so far, where a best one is sought."""
    return folder / f"checkpoint-{state.best_global_step}" if state.best_global_step else None


def _remove(checkpoint: Path) -> None:
    (checkpoint / DIGESTS).unlink(missing_ok=True)  # first: otherwise a process that dies here would leave what looks like a damaged one
    shutil.rmtree(checkpoint, ignore_errors=True)


def is_main_process() -> bool:
    """Whether this is the one process of a launcher that writes files and prints."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def workplace(out: Path, key: str) -> Iterator[Path]:
    """The folder of a run's checkpoints, beside `out`. It is kept if the run stops and a complete checkpoint is in it.

    `key` says which run it belongs to. Raises `UserError` where it belongs to a running process, or to a run of other weights,
    data, settings or seed.
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
        if not owner.exists() or owner.read_bytes() != key.encode():
            if last_whole(folder)[0] is not None:
                raise UserError(f"out: '{folder}' holds the checkpoints of another run (weights, data, settings or seed differ); remove it")
            if main:
                owner.write_text(key)
        yield folder
    except BaseException:
        lock.release()
        if main and not any(folder.glob(f"checkpoint-*/{DIGESTS}")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    lock.release()
    if main:
        shutil.rmtree(folder)
