"""What a person sees while a study runs: one moving line for what is going on, one fixed line for what is done."""

import itertools
import logging
import logging.handlers
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
        bar = self.open(title, total)
        try:
            yield lambda steps: self.advance(bar, steps)
        finally:
            self.close(bar)

    def open(self, title: str, total: int | None) -> Any:
        return self._progress.add_task(printable(title), total=total)

    def advance(self, bar: Any, steps: int) -> None:
        self._progress.advance(bar, steps)

    def close(self, bar: Any) -> None:
        self._progress.remove_task(bar)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._task, self._step = self.open("training", state.max_steps), 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.advance(self._task, state.global_step - self._step)
        self._step = state.global_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.close(self._task)


class Forwarded(Display):
    """The display of a worker process: all that is shown goes through a queue to the display of the process that a person looks at."""

    def __init__(self, messages: Any) -> None:
        self._messages, self._bars = messages, itertools.count()

    def __enter__(self) -> "Forwarded":
        quieten_libraries()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, line: str) -> None:
        self._messages.put(("say", line))

    def open(self, title: str, total: int | None) -> Any:
        bar = (os.getpid(), next(self._bars))
        self._messages.put(("open", bar, title, total))
        return bar

    def advance(self, bar: Any, steps: int) -> None:
        self._messages.put(("advance", bar, steps))

    def close(self, bar: Any) -> None:
        self._messages.put(("close", bar))

    def log_handler(self) -> logging.Handler:
        """Warnings of this process become messages, too."""
        handler = logging.handlers.QueueHandler(self._messages)
        handler.enqueue = lambda record: self._messages.put(("log", record))  # type: ignore[method-assign]
        return handler


@contextmanager
def forwarding(display: Display, context: Any) -> Iterator[Any]:
    """Gives a queue for `Forwarded` displays; while the block runs, `display` shows what comes through it."""
    messages = context.Queue()
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(display, messages, ended), daemon=True)
    thread.start()
    try:
        yield messages
    finally:
        ended.set()
        thread.join(2)  # a worker that was killed in the middle of a message may keep it waiting


def _show(display: Display, messages: Any, ended: threading.Event) -> None:
    bars: dict[Any, Any] = {}
    while True:
        try:
            kind, *content = messages.get(timeout=0.2)
        except queue.Empty:
            if ended.is_set():
                break
            continue
        if kind == "say":
            display.say(*content)
        elif kind == "log":
            logging.getLogger(content[0].name).handle(content[0])
        elif kind == "open":
            bars[content[0]] = display.open(*content[1:])
        elif kind == "advance" and content[0] in bars:
            display.advance(bars[content[0]], content[1])
        elif kind == "close" and content[0] in bars:
            display.close(bars.pop(content[0]))
    for bar in bars.values():
        display.close(bar)
