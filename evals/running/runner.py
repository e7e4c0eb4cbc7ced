"""The one loop: jobs are started when what they wait for has ended, here or in several processes. What comes out does not depend on how many."""

import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from evals.data import data_for
from evals.records import Record
from evals.running.jobs import Place, Read, frame_of, perform
from evals.running.plan import Job, plan
from evals.running.progress import Display, Forwarded, forwarding
from evals.study import Study
from proxytune.errors import UserError

SMALL = 100_000_000  # parameters of all members together: below, jobs run side by side
LOCK = ".running"


@dataclass(frozen=True)
class Finished:
    """All records in the study's order, and what every arm cost, one a run."""

    records: list[Record]
    costs: dict[str, list[Mapping[str, Any]]]


def run_study(study: Study, folder: Path, out: Path, display: Display, *, jobs: int | None = None, patient: bool = False) -> Finished:
    """Does all jobs of a study that are not done yet; returns the records.

    Stop it at any time and start it again: what is recorded or tuned is not done again, and the end is the same. `jobs` is how many processes
    work (None: as many as the machine has cores for; one where the members together exceed 100M parameters). `patient` waits for another
    command that works in `out`. Writes `out`/records, `out`/checkpoints, `out`/worlds and `out`/study.json. Raises `UserError` where `out` cannot be
    written or is in use, for what a job cannot do, and under a launcher of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("launcher: a study starts its own processes; start it without torchrun, and tune large arms beforehand with proxytune tune")
    place = Place(study, folder, out)
    try:
        for name in ("records", "checkpoints"):
            (out / name).mkdir(parents=True, exist_ok=True)
        with _alone_in(out, patient, display):
            (out / "study.json").write_text(study.model_dump_json(indent=1) + "\n")
            return _run(place, plan(study), display, jobs)
    except OSError as error:
        raise UserError(f"out: '{out}' cannot be written ({error}); choose another folder with --out") from error


def _run(place: Place, todo: Sequence[Job], display: Display, jobs: int | None) -> Finished:
    study = place.study
    parameters = 0
    if not study.worlds:  # what is wrong with a user's data is said before any work, and once
        data = data_for(study, place.folder, study.runs[0], place.worlds, display.say)
        parameters = sum(count_parameters(path) for path in (data.base, data.small) if path is not None)
    workers = workers_for(study, parameters, jobs, len(todo), display.say)
    torch.set_num_threads(study.threads)
    outcomes: dict[str, Any] = {}
    if workers == 1:
        _work_off(todo, _here(place, display), outcomes, workers)
    else:
        with _in_processes(place, display, workers) as start:
            _aside(lambda: _work_off(todo, start, outcomes, workers))
    reads = [outcomes[job.name] for job in todo if job.kind == "read" and not job.trial]
    records = [
        Record(entry.arm, entry.frame, entry.run.world, entry.run.seed, entry.protocol, frame_of(place, entry))
        for read in reads
        for entry in read.entries
    ]
    order = {arm: position for position, arm in enumerate(study.arm_settings)}
    runs = {run: position for position, run in enumerate(study.runs)}
    records.sort(key=lambda record: (record.frame, order[record.arm], runs[record.world, record.seed]))  # type: ignore[index]
    return Finished(records, _costs(reads, order))


def _costs(reads: Sequence[Read], order: Mapping[str, int]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for read in reads:
        for arm, cost in read.costs.items():
            found.setdefault(arm, []).append(cost)
    return {arm: found[arm] for arm in sorted(found, key=order.__getitem__)}


def workers_for(study: Study, parameters: int, wanted: int | None, most: int, say: Callable[[str], None]) -> int:
    """How many processes work: as wanted, else one for every so many cores as a job has threads, but one where models are large."""
    if parameters > SMALL:
        if (wanted or 1) > 1:
            say(f"--jobs {wanted}: the members have {parameters:,} parameters together, more than {SMALL:,}; one job runs at a time")
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(wanted or cores // study.threads, most))


def count_parameters(path: str) -> int:
    """Of the model in a folder or of a hub name, by its configuration alone. 0 where that cannot be read: loading it will say why."""
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except Exception:  # whatever a damaged folder may raise
        return 0
    return sum(parameter.numel() for parameter in model.parameters())


Start = Callable[[Job, Mapping[str, Any]], "Future[Any]"]


def _work_off(todo: Sequence[Job], start: Start, outcomes: dict[str, Any], workers: int) -> None:
    """Starts jobs in the plan's order as soon as what they wait for has ended, so many at a time; the first error stops all."""
    waiting = list(todo)
    running: dict[Future[Any], Job] = {}
    while waiting or running:
        ready = [job for job in waiting if all(name in outcomes for name in job.waits)]
        for job in ready[: workers - len(running)]:
            waiting.remove(job)
            running[start(job, {name: outcomes[name] for name in _needed(job, todo)})] = job
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            outcomes[running.pop(future).name] = future.result()


def _needed(job: Job, todo: Sequence[Job]) -> tuple[str, ...]:
    """The jobs whose outcomes a job takes: those it waits for, and for a reading also the selection that its tuning waited for."""
    before = next((other for other in todo if other.name == job.tuned), None)
    selections = [
        name for name in (before.waits if before is not None else ()) if any(other.name == name and other.kind == "select" for other in todo)
    ]
    return (*job.waits, *selections)


def _aside(act: Callable[[], None]) -> None:
    """Calls `act` in a thread and waits. A signal is raised in the main thread only: it cannot stop `act` while it holds a lock of the executor,
    without which the executor would never end."""
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def call() -> None:
        try:
            act()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    threading.Thread(target=call, daemon=True).start()
    error = ended.get()
    if error is not None:
        raise error


def _here(place: Place, display: Display) -> Start:
    """One job at a time in this process."""

    def start(job: Job, outcomes: Mapping[str, Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(perform(job, place, outcomes, display))
        return future

    return start


@contextmanager
def _in_processes(place: Place, display: Display, workers: int) -> Iterator[Start]:
    """Jobs in processes of their own. However this one ends, none of them is left."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])  # the libraries are imported once for all workers
    with forwarding(display, context) as messages:
        executor = ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(messages, place.study.threads))
        try:
            yield lambda job, outcomes: executor.submit(_perform_there, place, job, outcomes)
        except BrokenProcessPool as error:
            raise UserError("jobs: a process has died, perhaps for want of memory; run the same command with --jobs 1, it goes on") from error
        finally:
            _end(executor)


def _end(executor: ProcessPoolExecutor) -> None:
    """Ends idle workers, and those that are at work after an error or a signal: what they have not saved is made again."""
    executor.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.join(0.2)
        if process.is_alive():
            process.terminate()
    for process in multiprocessing.active_children():
        process.join(5)
        if process.is_alive():
            process.kill()


_display: Forwarded | None = None


def _prepare(messages: Any, threads: int) -> None:
    """Of a worker: signals are the parent's affair, and without a parent there is no worker."""
    global _display
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a worker that is terminated would leave behind
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
    """Holds the folder for this command; the system gives it back however the command ends."""
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
