"""Blocks of one file made part of another without passing through this process, where the file system can.

A file system with reflinks (Btrfs, XFS, bcachefs, ZFS …) notes that two files have the same blocks: nothing is read,
nothing written, nothing more taken of the disk.  A file server can copy by itself what would go to and fro over the
network.  Anywhere else the kernel would copy through the page cache, which costs more than writing past it (measured
on ext4: 1.0 against 2.1 GB/s); there nothing is shared.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Final

from mmsplit.checkpoint.file_system import is_network_file_system

#: ioctl FICLONERANGE of <linux/fs.h>; it takes struct file_clone_range: fd, start, length, offset in the other file.
_FICLONERANGE: Final = 0x4020940D
_CLONE_RANGE: Final = struct.Struct("=qQQQ")
#: What says "not here" rather than "this disk fails".
_REFUSED: Final = frozenset(
    (
        errno.EOPNOTSUPP,
        errno.ENOTTY,
        errno.EINVAL,
        errno.EXDEV,
        errno.ENOSYS,
        errno.EPERM,
        errno.EACCES,
        errno.EBADF,
        errno.ETXTBSY,
    )
)


class Twin:
    """Bytes from `start` of the open file `fd`, block-aligned, that are the same as those about to be written."""

    def __init__(self, fd: int, start: int) -> None:
        self._fd = fd
        self._start = start
        self.is_shared: bool | None = None

    def share(self, target_fd: int, offset: int, size_bytes: int) -> bool:
        """Make these bytes those of the target from `offset` on, also noted as `is_shared`; False if that cannot be.

        Raises `OSError` where the disk is at fault.
        """
        self.is_shared = share_blocks(self._fd, self._start, target_fd, offset, size_bytes)
        return self.is_shared


def share_blocks(fd: int, start: int, target_fd: int, offset: int, size_bytes: int) -> bool:
    """See `Twin.share`."""
    try:
        if _clone(fd, start, target_fd, offset, size_bytes):
            return True
        if is_network_file_system(target_fd) and hasattr(os, "copy_file_range"):
            copy_blocks(fd, start, target_fd, offset, size_bytes)
            return True
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    return False


def copy_blocks(fd: int, start: int, target_fd: int, offset: int, size_bytes: int) -> None:
    """Let the kernel, or the server behind it, copy a range; raises `OSError`."""
    done = 0
    while done < size_bytes:
        count = os.copy_file_range(fd, target_fd, size_bytes - done, start + done, offset + done)
        if count == 0:
            raise OSError(errno.EIO, "file is shorter than it was")
        done += count


def _clone(fd: int, start: int, target_fd: int, offset: int, size_bytes: int) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.ioctl(target_fd, _FICLONERANGE, _CLONE_RANGE.pack(fd, start, size_bytes, offset))
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return True
