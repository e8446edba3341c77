"""The file that many threads write to, a payload or a merged shard; and a payload read back in whole blocks.

Copying into the page cache costs more processor time than compressing, so blocks are written with O_DIRECT where
the file system takes it; that is found out by trying, not by its name.  Elsewhere blocks are written through the
cache and their write-back is started at once, so that dirty pages do not pile up until the final sync.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Final

from mmsplit.sidecar.block_sharing import Twin
from mmsplit.sidecar.output_files import open_unfinished, output_errors, write_all

_REFUSED: Final = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class PayloadFile:
    """A file open for writing at any offset by several threads; nothing is truncated at opening."""

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._direct_fd: int | None = None
        self._retired_fd: int | None = None
        with output_errors(path):
            self._fd = open_unfinished(path)
            if direct and hasattr(os, "O_DIRECT"):
                try:
                    self._direct_fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
                except OSError as error:
                    if error.errno not in _REFUSED:
                        os.close(self._fd)
                        raise

    @property
    def is_direct(self) -> bool:
        """Whether blocks bypass the page cache at this moment."""
        return self._direct_fd is not None

    def write_block(self, offset: int, block: memoryview, twin: Twin | None = None) -> None:
        """Write a block whose memory, offset and length are multiples of the slot alignment.

        Where `twin` has the same bytes, the file system may share them instead.
        """
        with output_errors(self.path):
            if twin is not None and twin.share(self._fd, offset, len(block)):
                return
            direct_fd = self._direct_fd
            if direct_fd is not None:
                try:
                    write_all(direct_fd, block, offset)
                    return
                except OSError as error:
                    if error.errno not in _REFUSED:
                        raise
                    # Opening was allowed, writing is not, or a short write left an offset that is no multiple.
                    self._stop_direct(direct_fd)
            self.write(offset, block)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset, len(block), os.POSIX_FADV_DONTNEED)  # starts write-back

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of any length anywhere, through the page cache."""
        with output_errors(self.path):
            if hasattr(os, "pwrite"):
                write_all(self._fd, memoryview(data), offset)
            else:
                with self._lock:
                    write_all(self._fd, memoryview(data), offset)

    def read_back(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; for checking what was written."""
        with output_errors(self.path):
            _read_all(self._fd, offset, buffer, self._lock)

    def finish(self, size_bytes: int) -> None:
        """Cut the file to `size_bytes` and make it durable."""
        with output_errors(self.path):
            os.ftruncate(self._fd, size_bytes)
            os.fsync(self._fd)

    def close(self) -> None:
        """Close; what was not finished stays as it is."""
        for fd in (self._direct_fd, self._retired_fd):
            if fd is not None:
                os.close(fd)
        self._direct_fd = self._retired_fd = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _stop_direct(self, direct_fd: int) -> None:
        with self._lock:
            if self._direct_fd is direct_fd:
                # Open until `close`: another thread may be writing through it; closing would free its number.
                self._direct_fd, self._retired_fd = None, direct_fd


class BlockReader:
    """Reads whole blocks of a file that is complete, past the page cache where the file system allows.

    What was written past the cache is not in it; to bring it there costs a copy, and room that others need.
    """

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._direct_fd: int | None = None
        with output_errors(path):
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            if direct and hasattr(os, "O_DIRECT"):
                try:
                    self._direct_fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
                except OSError as error:
                    if error.errno not in _REFUSED:
                        os.close(self._fd)
                        raise

    def read_blocks(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`, whose memory, offset and length are multiples of the slot alignment."""
        with output_errors(self.path):
            if self._direct_fd is not None:
                try:
                    _read_all(self._direct_fd, offset, buffer, self._lock)
                    return
                except OSError as error:
                    if error.errno not in _REFUSED:
                        raise
                    # Opening was allowed, reading is not, or a short read left an offset that is no multiple.
            _read_all(self._fd, offset, buffer, self._lock)

    def close(self) -> None:
        """Close the file; nobody may be reading."""
        for fd in (self._direct_fd, self._fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._direct_fd, self._fd = None, -1


def _read_all(fd: int, offset: int, buffer: memoryview, lock: threading.Lock) -> None:
    """Fill `buffer` from `offset`; raises `OSError` where the file ends before that."""
    while buffer:
        if hasattr(os, "preadv"):
            count = os.preadv(fd, [buffer], offset)
        else:
            with lock:  # Windows has one file position per handle
                os.lseek(fd, offset, os.SEEK_SET)
                data = os.read(fd, len(buffer))
                count = len(data)
                buffer[:count] = data
        if count == 0:
            raise OSError(errno.EIO, "file is shorter than what was written to it")
        buffer, offset = buffer[count:], offset + count
