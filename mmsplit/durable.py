"""What makes changes of a directory survive a loss of power."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path


def make_directory(path: Path) -> list[Path]:
    """Make a directory and those above it that are missing; their names survive a loss of power.

    Returns those that were missing, the innermost first.  Raises `OSError`.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing or [path]:  # one that is there may be of a run that was killed before it had synced
        try:
            sync_directory(folder.parent)
        except PermissionError:
            pass  # a directory that may be written to and not read cannot be synced
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove directories that were made for nothing, in this order; one that holds anything stays, as do the others."""
    try:
        for folder in folders:
            folder.rmdir()
    except OSError:
        pass  # an empty directory that stays does no harm


def sync_directory(path: Path) -> None:
    """Make renames and unlinks in `path` durable; not every system can.  Raises `OSError`."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without directory sync
            raise
    finally:
        os.close(fd)
