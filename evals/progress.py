"""What a person sees while a study runs: one moving line for what is going on, one fixed line for what is done."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from proxytune.printable import printable


def quieten_libraries() -> None:
    """Turns off the bars and notices of the libraries beneath, which would run through our own output."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # transformers and trl announce their next major release to each other; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|torch")


class Display(TrainerCallback):
    """Writes to standard error only, so that standard output holds the table and nothing else. Also watches trainers. `quiet` is for the
    processes beside the first."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,  # in a file it would leave empty lines
        )

    def __enter__(self) -> "Display":
        quieten_libraries()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Leaves one line standing, whatever the text holds."""
        self._console.print(Text(printable(line)), soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Shows a bar while the block runs; the block calls what it is given with the steps it has done."""
        task = self._progress.add_task(printable(title), total=total)
        try:
            yield lambda steps: self._progress.advance(task, steps)
        finally:
            self._progress.remove_task(task)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._task = self._progress.add_task("training", total=state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._progress.remove_task(self._task)
