"""Models that a command is given by name or folder, as parts of a study."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evals.study import Study, expanded, explain_invalid
from proxytune.errors import UserError

RESERVED = ("base", "expert", "proxy")


def absolute(name: str) -> str:
    """A folder or file by its whole path; a hub name as it is."""
    return str(expanded(name).absolute()) if expanded(name).exists() else name


def study_of(command: str, content: dict[str, Any]) -> Study:
    """Raises `UserError`, in the command's name, for what is no study."""
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{command}: {explain_invalid(error)}") from error


def direct_arms(command: str, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """An arm for each tuned model, named as its folder; by its path where that is not unique. Raises `UserError` for a model given twice."""
    if len(set(paths)) < len(paths):
        raise UserError(f"{command}: {', '.join(paths)} names a model twice; give each once")
    names = [Path(path).name or path for path in paths]
    return {
        name if names.count(name) == 1 and name not in RESERVED else path: {"kind": "direct", "path": absolute(path)}
        for name, path in zip(names, paths, strict=True)
    }
