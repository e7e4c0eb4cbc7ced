"""Files that a user names: only regular files are read, and nothing is written through a link."""

import os
import stat
from pathlib import Path

from proxytune.errors import UserError


def check_readable(path: Path, field: str, within: Path | None = None) -> None:
    """Raises `UserError` where `path` is neither a file nor a folder (reading a pipe or a device may never end), or, with
    `within`, where a link leads out of that folder. A missing path passes: its reader raises."""
    if within is not None and not os.path.realpath(path).startswith(os.path.join(os.path.realpath(within), "")):
        raise UserError(f"{field}: '{path}' leads out of '{within}' by a link; put a copy of the file in its place, or remove it")
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{field}: '{path}' is a pipe, a socket or a device, not a file; write its content into a file and give that")


def check_writable(path: Path, field: str) -> None:
    """Raises `UserError` where `path` is a link or anything else that is not a file: writing to it would change something elsewhere."""
    if path.is_symlink() or (os.path.lexists(path) and not path.is_file()):
        raise UserError(f"{field}: '{path}' is a link or no file, and results are not written through it; remove it or choose another folder")
