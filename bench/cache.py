"""The page cache: put files into it, drop them from it, and look whether they are in it.

"Cold" means: not in the page cache of this machine.  What a disk, or the host of a virtual disk, caches for itself
cannot be seen from here, and falls on both sides of a comparison.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_PAGE: Final = mmap.PAGESIZE
_BLOCK_BYTES: Final = 8 << 20
#: A few pages may be in other hands at the moment of the look.
_COLD_SHARE: Final = 0.002
_WARM_SHARE: Final = 0.99


def warm(paths: Sequence[Path]) -> None:
    """Read files from end to end, so that they are cached."""
    buffer = bytearray(_BLOCK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(paths: Sequence[Path]) -> None:
    """Write back what is dirty and drop the files' pages from the cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def is_cold(path: Path) -> bool:
    """Say whether next to nothing of a file is cached."""
    return resident_share(path) <= _COLD_SHARE


def is_warm(path: Path) -> bool:
    """Say whether next to all of a file is cached."""
    return path.stat().st_size == 0 or resident_share(path) >= _WARM_SHARE


def resident_share(path: Path) -> float:
    """Return how much of a file is in the page cache, from 0 to 1, as `mincore` sees it."""
    size = path.stat().st_size
    if size == 0:
        return 0.0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "cannot map the file", str(path))
    try:
        pages = -(-size // _PAGE)
        states = ctypes.create_string_buffer(pages)
        if libc.mincore(address, size, states) != 0:
            raise OSError(ctypes.get_errno(), "mincore failed", str(path))
        return sum(state & 1 for state in states.raw) / pages
    finally:
        libc.munmap(address, size)
