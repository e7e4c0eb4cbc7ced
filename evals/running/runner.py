"""Runs a study: a job starts when the jobs it waits for have ended, in this process or in several. Results do not depend on how many."""

import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import BaseContext
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from evals.data import data_for
from evals.records import Record
from evals.running.costs import with_trials
from evals.running.jobs import Place, Read, forget_inputs, frame_of, perform
from evals.running.plan import Job, plan
from evals.running.progress import Display, Forwarded, forwarding
from evals.selection import Choices, recorded, trials_of
from evals.study import DIRECT, Run, Study
from proxytune.errors import UserError

SMALL = 100_000_000  # parameters of all members together, up to which jobs run in parallel
LOCK = ".running"


@dataclass(frozen=True)
class Finished:
    """All records in the study's order, every arm's costs, one entry per run, what was selected in every run (empty if nothing was), and the first
    prompt of every frame as text and ids."""

    records: list[Record]
    costs: dict[str, list[Mapping[str, Any]]]
    choices: dict[Run, Choices]
    prompts: dict[str, str] = field(default_factory=dict)


def run_study(study: Study, folder: Path, out: Path, display: Display, *, jobs: int | None = None, patient: bool = False) -> Finished:
    """Does all jobs of a study that are not done yet, and returns all records.

    It can be stopped at any time and started again: what is recorded or tuned is not done again, and the results are the same. `jobs` is the
    number of processes (None: one per core, divided by the study's threads; always one if the members together exceed 100M parameters). `patient`
    waits for another command that works in `out`. Writes `out`/records, `out`/checkpoints, `out`/worlds and `out`/study.json. Raises `UserError` if
    `out` cannot be written or is in use, if a job fails by a user's mistake, and under a launcher of several processes (torchrun).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("launcher: a study starts its own processes; start it without torchrun, and tune large arms beforehand with proxytune tune")
    place, todo = Place(study, folder, out), plan(study)
    try:
        for name in ("records", "checkpoints"):
            (out / name).mkdir(parents=True, exist_ok=True)
        with _alone_in(out, patient, display):
            (out / "study.json").write_text(study.model_dump_json(indent=1) + "\n")
            return _run(place, todo, display, jobs)
    except OSError as error:
        raise UserError(f"out: '{out}' cannot be written ({error}); choose another folder with --out") from error


def _run(place: Place, todo: Sequence[Job], display: Display, jobs: int | None) -> Finished:
    study = place.study
    forget_inputs()
    parameters = 0
    if not study.worlds:  # mistakes in a user's data are reported once, before any work
        data = data_for(study, place.folder, study.runs[0], place.worlds, display.say)
        parameters = sum(count_parameters(path) for path in (data.base, data.small) if path is not None)
    workers = workers_for(study, parameters, jobs, len(todo), display.say)
    torch.set_num_threads(study.threads)
    outcomes: dict[str, Any] = {}
    ended: Ended = SimpleQueue()
    work = _here(place, ended, display) if workers == 1 else _in_processes(place, ended, display, workers)
    with work as start:
        _work_off(todo, start, ended, outcomes, workers)
    before = recorded(study)
    choices = dict.fromkeys(study.runs, before) if before else {job.run: found for job in todo if isinstance(found := outcomes[job.name], Choices)}
    reads = [(job, outcomes[job.name]) for job in todo if job.kind == "read" and not job.trial]
    classified = [(job, outcomes[job.name]) for job in todo if job.kind == "classify"]
    entries = dict.fromkeys(  # a study may also ask for what was classified
        (entry, run)
        for job, read in (*reads, *classified)
        for run in study.runs
        if run == job.run or (job.tuned is None and run.first == job.run)  # what is not tuned stands beside every tuning
        for entry in read.entries
    )
    records = [Record(entry.arm, entry.frame, run.world, run.seed, entry.protocol, frame_of(place, entry), run.tuning) for entry, run in entries]
    if study.selects_direct:  # the same frames under another name
        alias = [record for record, (_, run) in zip(records, entries, strict=True) if record.arm == choices[run][DIRECT].label]
        records += [replace(record, arm=DIRECT) for record in alias]
    order = {arm: position for position, arm in enumerate(study.arm_settings)}
    frames = {frame: position for position, frame in enumerate(dict.fromkeys(record.frame for record in records))}
    runs = {run: position for position, run in enumerate(study.runs)}
    records.sort(key=lambda record: (frames[record.frame], order[record.arm], runs[Run(record.world, record.seed, record.tuning)]))
    prompts = {entry.frame: entry.first for entry, _ in entries if entry.first}
    return Finished(records, _costs(study, [(job.run, read) for job, read in reads], choices), choices, prompts)


def _costs(study: Study, reads: Sequence[tuple[Run, Read]], choices: Mapping[Run, Choices]) -> dict[str, list[Mapping[str, Any]]]:
    """Every arm's costs, one entry per run, with those of the trials by which it was selected. The row `direct` costs what the selected arm costs
    without its own trials, and the trials of all direct arms."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for run, read in reads:
        chosen = choices.get(run, Choices())
        for arm, cost in read.costs.items():
            for row in (arm, DIRECT) if DIRECT in chosen and chosen[DIRECT].label == arm else (arm,):
                trials = trials_of(study, row, chosen)
                found.setdefault(row, []).append(with_trials(cost, trials) if trials else cost)
    return {arm: found[arm] for arm in study.arm_settings if arm in found}


def workers_for(study: Study, parameters: int, wanted: int | None, most: int, say: Callable[[str], None]) -> int:
    """The number of processes: as wanted, by default the number of cores divided by the threads per job; one if models are large."""
    if parameters > SMALL:
        if (wanted or 1) > 1:
            say(f"--jobs {wanted}: the members have {parameters:,} parameters together, more than {SMALL:,}; one job runs at a time")
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(wanted or cores // study.threads, most))


def count_parameters(path: str) -> int:
    """The number of parameters of a local or hub model, from its configuration alone. 0 if that cannot be read; loading it reports the reason."""
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except Exception:  # whatever a damaged folder may raise
        return 0
    return sum(parameter.numel() for parameter in model.parameters())


Start = Callable[[Job, Mapping[str, Any]], None]
Ended = SimpleQueue[Callable[[], tuple[str, Any]]]  # of each job that ended: what gives its name and outcome, or raises its error


def _work_off(todo: Sequence[Job], start: Start, ended: Ended, outcomes: dict[str, Any], workers: int) -> None:
    """Starts jobs in the plan's order as soon as the jobs they wait for have ended, at most `workers` at a time. The first error stops all."""
    waiting, running = list(todo), 0
    while waiting or running:
        ready = [job for job in waiting if all(name in outcomes for name in job.waits)]
        for job in ready[: workers - running]:
            waiting.remove(job)
            running += 1
            start(job, {name: outcomes[name] for name in job.waits})
        name, outcome = ended.get()()
        outcomes[name] = outcome
        running -= 1


@contextmanager
def _here(place: Place, ended: Ended, display: Display) -> Iterator[Start]:
    """One job at a time in this process."""

    def start(job: Job, outcomes: Mapping[str, Any]) -> None:
        outcome = perform(job, place, outcomes, display)
        ended.put(lambda: (job.name, outcome))

    yield start


@contextmanager
def _in_processes(place: Place, ended: Ended, display: Display, workers: int) -> Iterator[Start]:
    """Jobs in processes of their own. However this one ends, none of them is left."""
    context = _context()
    with forwarding(display, context) as messages, _signals_in(ended):
        executor = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(messages, place.study.threads))

        def start(job: Job, outcomes: Mapping[str, Any]) -> None:
            future = executor.submit(_perform_there, place, job, outcomes)
            future.add_done_callback(lambda done: ended.put(lambda: (job.name, done.result())))

        try:
            yield start
        except BrokenProcessPool as error:
            raise UserError("jobs: a process has died, perhaps for lack of memory; run the same command with --jobs 1, it continues") from error
        finally:
            _end(executor)


def _context() -> BaseContext:
    """Workers are forked from a clean process that has imported the libraries; where there is no fork they are started anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@contextmanager
def _signals_in(ended: Ended) -> Iterator[None]:
    """Ctrl-C and SIGTERM wait in the queue until the loop looks at it: raised inside the executor they could leave a lock held forever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {int(number): handler for number in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(number))}
    came: list[Callable[[], Any]] = []

    def keep(number: int, frame: FrameType | None) -> None:
        came.append(lambda: handlers[number](number, frame))
        ended.put(came[-1])

    for number in handlers:
        signal.signal(number, keep)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:  # after the last job
        came[0]()


def _end(executor: ProcessPoolExecutor) -> None:
    """Ends idle workers, and after an error or a signal also busy ones: what they have not saved is made again in the next run."""
    executor.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.join(0.2)
        if process.is_alive():
            process.kill()
    for process in multiprocessing.active_children():
        process.join(5)


_display: Forwarded | None = None


def _prepare(messages: Any, threads: int) -> None:
    """Initializes a worker: the parent handles Ctrl-C, and the worker exits when its parent does."""
    global _display
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    gc.freeze()  # trainers collect garbage often; they need not look through the libraries each time
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own lock is one between processes, which a worker that is killed would leave behind
    _display = Forwarded(messages)
    _display.__enter__()
    logging.getLogger("proxytune").addHandler(_display.log_handler())


def _die_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _perform_there(place: Place, job: Job, outcomes: Mapping[str, Any]) -> Any:
    assert _display is not None
    return perform(job, place, outcomes, _display)


@contextmanager
def _alone_in(out: Path, patient: bool, display: Display) -> Iterator[None]:
    """Locks the folder for this command; the system releases the lock however the command ends."""
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not patient:
            raise UserError(f"out: another command is running in '{out}'; wait for it, add --wait, or choose another folder") from error
        with display.bar("waiting for the other command in this folder", None):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
