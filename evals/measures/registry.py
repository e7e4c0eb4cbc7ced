"""The list of measures. A measure is added by `register`; every module of this folder is imported when the list is first needed."""

import importlib
import pkgutil
from functools import cache
from typing import Any

from proxytune.errors import UserError

_measures: dict[str, Any] = {}


def register(measure: Any) -> Any:
    """Adds a `Measure`. Raises `UserError` if another measure has its name."""
    if type(_measures.get(measure.name, measure)) is not type(measure):
        raise UserError(f"measures: two are called '{measure.name}'; rename one")
    _measures[measure.name] = measure
    return measure


def measures() -> dict[str, Any]:
    """All measures by name."""
    _import_all()
    return _measures


@cache
def _import_all() -> None:
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
