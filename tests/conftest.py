"""How the suite runs: in two processes, of one thread each."""

import gc
import os

import pytest

for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")  # before numpy and torch are imported, here, in workers and in what tests start


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Without pytest-xdist (`-p no:xdist`) its options in pyproject.toml say nothing."""
    if not pluginmanager.has_plugin("xdist"):
        for name in ("--numprocesses", "--dist"):
            parser.addoption(name, help="belongs to pytest-xdist")


def pytest_configure(config: pytest.Config) -> None:
    """Fixtures are for the processes that run tests: the one that only hands them out need not import torch first."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses") or not config.pluginmanager.has_plugin("xdist"):
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish() -> None:
    """What is imported by now stays: a trainer collects garbage twice a run, and need not look through the libraries for it."""
    gc.collect()
    gc.freeze()
