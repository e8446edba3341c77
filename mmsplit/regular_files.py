"""Reading files that somebody else may have put there: only regular ones.

A name can lead to a FIFO, which is never at its end, to a terminal, or to `/dev/zero`, which says that its length is
zero and gives bytes for ever.  Whoever opens such a thing by mistake hangs, or fills the memory.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def require_regular(path: Path) -> None:
    """Raise `OSError` for what is no regular file, links followed; opening it might already wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(code, os.strerror(code) if path.is_dir() else "Not a regular file", str(path))


def is_regular(path: Path) -> bool:
    """Whether there is a regular file, links followed; there is none of a name that the system does not take."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file, as far as its length says: there are some in /proc that never end.

    Raises `OSError`.
    """
    require_regular(path)
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size
        pieces = []
        while left and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
    return b"".join(pieces)
