"""Arguments given by name: suggestions for unknown names, and dtypes by their names."""

import difflib
from collections.abc import Iterable
from typing import Any

import torch

from proxytune.errors import UserError, brief
from proxytune.member import DTYPES


def unknown_name(name: str, known: Iterable[str], meant: str | None = None) -> str:
    """The second half of an error message about an unknown name: the nearest known one (or `meant`), and all of them."""
    names = sorted(known)
    close = [meant] if meant else difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}there are {', '.join(names)}"


def read_dtype(value: Any, field: str = "dtype") -> torch.dtype:
    """A dtype of weights from itself or its name, 'bfloat16' or 'torch.bfloat16'. Raises `UserError` naming `field`."""
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if isinstance(value, torch.dtype) and value in DTYPES:
        return value
    if isinstance(value, str) and value.removeprefix("torch.") in names:
        return names[value.removeprefix("torch.")]
    raise UserError(f"{field}: weights are loaded in {', '.join(names)}, not {brief(value)}; choose one of these")
