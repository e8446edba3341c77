"""What makes changes of a directory survive a loss of power."""

from __future__ import annotations

import errno
import os
from pathlib import Path


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
