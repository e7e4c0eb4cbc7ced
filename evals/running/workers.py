"""How worker processes are started. Without heavy imports, so that they can be prepared while this process still imports."""

import multiprocessing
from multiprocessing.context import BaseContext

PRELOADED = "evals.running.runner"  # with all libraries: imported once for all workers


def worker_context() -> BaseContext:
    """Workers are forked from a clean process that has imported the libraries; where there is no fork they are started anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def warm_up() -> None:
    """Starts the imports of the process that workers are forked from."""
    if worker_context().get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()
