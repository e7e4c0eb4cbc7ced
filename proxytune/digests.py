"""Digests: a finished folder records the size and SHA-256 of its files, so that damage is noticed when they are read."""

import hashlib
import json
import logging
import os
import shutil
import stat
from pathlib import Path, PurePosixPath

from proxytune.errors import UserError

DIGESTS = "digests.json"
logger = logging.getLogger("proxytune")


def seal(folder: Path) -> None:
    """Flushes every file in and below a folder to the disk; then writes the digests of all to `digests.json`, atomically."""
    sealed = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / DIGESTS:
            with file.open("rb") as written:
                os.fsync(written.fileno())
                sealed[file.relative_to(folder).as_posix()] = {
                    "size": file.stat().st_size,
                    "sha256": hashlib.file_digest(written, "sha256").hexdigest(),
                }
    partial = folder / f"{DIGESTS}.partial"
    partial.write_text(json.dumps(sealed, indent=1) + "\n")
    partial.replace(folder / DIGESTS)


def find_damage(folder: Path) -> str | None:
    """How a folder differs from when it was sealed, in a few words; None where it does not. Files that were added later do not count."""
    try:
        sealed = [(str(name), int(entry["size"]), str(entry["sha256"])) for name, entry in json.loads((folder / DIGESTS).read_bytes()).items()]
    except FileNotFoundError:
        return f"{DIGESTS} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{DIGESTS} cannot be read"
    for name, size, digest in sealed:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            return f"{DIGESTS} names a file outside of the folder"
        try:
            found = (folder / name).stat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is not a plain file"
            if found.st_size != size:
                return f"{name} has {found.st_size} bytes instead of {size}"
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"the bytes of {name} are not those that were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            return f"{name[:100]} cannot be read ({type(error).__name__})"
    return None


def is_whole(folder: Path) -> bool:
    """Whether a sealed folder exists and is undamaged. A warning names a damaged one; the caller makes it again."""
    if not folder.exists():
        return False
    damage = find_damage(folder)
    if damage is not None:
        logger.warning("'%s' is damaged (%s); it is made again", folder, damage)
    return damage is None


def check_whole(folder: str | Path, field: str) -> None:
    """Raises `UserError` naming `field` for a sealed folder that is damaged. Folders without digests, and hub names, are not checked."""
    if (Path(folder) / DIGESTS).exists():
        damage = find_damage(Path(folder))
        if damage is not None:
            raise UserError(
                f"{field}: '{folder}' is damaged ({damage}); make it again, or remove its {DIGESTS} if you changed it yourself and take it as it is"
            )


def publish(made: Path, target: Path) -> None:
    """Seals the folder `made` and moves it to `target`: there the result appears whole or not at all.

    A folder that was at `target` is moved to "replaced" beside `made`; the caller removes it.
    """
    seal(made)
    if target.is_dir():
        replaced = made.with_name("replaced")
        shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed here
        target.rename(replaced)
    made.rename(target)
