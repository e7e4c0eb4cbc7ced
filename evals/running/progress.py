"""What a user sees while a study runs: a bar for each thing that is in progress, and a line for each thing that is done."""

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
    """Turns off the progress bars and notices of libraries, which would disturb our own output."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # transformers, trl and torch warn each other of future changes; users cannot act on these warnings.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|torch")


class Display(TrainerCallback):
    """Writes to standard error only, so that standard output holds only the tables. Also shows the progress of trainers. `quiet` shows nothing, for
    all processes but the first."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,  # in a file, bars would leave empty lines
        )

    def __enter__(self) -> "Display":
        quieten_libraries()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Prints one line. Control characters in the text are escaped."""
        self._console.print(Text(printable(line)), soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Shows a bar while the block runs. Yields a function that the block calls with the number of steps done since the last call."""
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
    """The display of a worker process: everything goes through a queue to the display of the parent process."""

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
        """A handler that sends this process' warnings through the queue."""
        handler = logging.handlers.QueueHandler(self._messages)
        handler.enqueue = lambda record: self._messages.put(("log", record))  # type: ignore[method-assign]
        return handler


@contextmanager
def forwarding(display: Display, context: Any) -> Iterator[Any]:
    """Yields a queue for `Forwarded` displays; while the block runs, `display` shows what comes through the queue."""
    messages = context.Queue()
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(display, messages, ended), daemon=True)
    thread.start()
    try:
        yield messages
    finally:
        ended.set()
        thread.join(2)  # if a worker was killed in the middle of a message, the thread may wait forever


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
