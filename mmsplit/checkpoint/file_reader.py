"""The one place that maps memory and the one place that reads ranges of local files.

Strategy.  A range is *borrowed*: `with reader.borrow(start, stop, scratch) as view`.  On Linux the view is a slice
of a memory map: its pages are faulted in by one `madvise(MADV_POPULATE_READ)` before the view is handed out, and
dropped when it is given back, so that resident memory is the ranges in flight and nothing more.  Anywhere else,
and wherever a map would not be safe, the bytes are read into the caller's scratch buffer.  Who reads a range once and
never again says so ("direct"): what the page cache does not have is then read past it, straight into the scratch
buffer, which takes less processor time and leaves the cache, and the memory, to others.

Why a map can be unsafe: when a file is truncated while it is mapped, touching a page past its new end kills the
process with SIGBUS, which Python cannot catch.  So a file is only mapped under a *read lease* (fcntl(2),
F_SETLEASE): whoever opens it for writing or truncates it is held up by the kernel until the lease is given back,
which `borrow` does after the views in flight are returned; from then on the file is read, not mapped.  Where no
lease can be had (not the owner, opened for writing elsewhere), or where it would not bind everybody (a network file
system), the file is read from the start.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import mmap
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple

from mmsplit.checkpoint.file_system import is_network_file_system
from mmsplit.errors import CheckpointError, MmsplitError, RequestError, SourceChangedError
from mmsplit.regular_files import require_regular

#: How ranges are read.  auto: mapped under a lease that binds everybody, else read.  mmap: mapped, under a lease where
#: one can be had; without one, a truncation in the moment in which a range is used ends the process.  pread: read.
#: view: mapped without a lease, for views that outlive the reader (`view_of_map`); the caller owns the file's fate.
IoMode = Literal["auto", "mmap", "pread", "view"]

#: Whether a range that is borrowed comes by way of the page cache, or past it unless it is there already.
ReadMode = Literal["cached", "direct"]

_MADV_POPULATE_READ: Final = 22  # Linux 5.14, <asm-generic/mman-common.h>; Python 3.11 has no name for it
_MADV_DONTNEED: Final = 4
_PAGE: Final = mmap.PAGESIZE
#: Memory that a disk reads into or writes from lies in pages of this size where the kernel has them.  4 MiB are then 2
#: pieces, not 1,024: measured on a virtual disk, read at 3.2 GB/s where small pages gave 1.2, written at 4.1 for 2.5.
_HUGE_PAGE: Final = 2 << 20
#: What O_DIRECT may ask for: offset, length and memory in multiples of this.
_BLOCK: Final = 4096
#: Below this a read past the page cache gains nothing over one through it, which brings the neighbours along.
_LEAST_DIRECT_BYTES: Final = 256 << 10
#: What a file system says that does not know O_DIRECT.
_REFUSED: Final = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
#: Ranges returned between two sweeps of the whole map; a sweep costs some ten microseconds.
_SWEEP_EVERY: Final = 32


class Fingerprint(NamedTuple):
    """What tells one state of a file from another without reading it."""

    size_bytes: int
    mtime_ns: int
    inode: int
    device: int


class Scratch:
    """A page-aligned buffer that grows to the largest size asked for and is reused; one per thread."""

    def __init__(self) -> None:
        self._memory = aligned_buffer(0)

    def take(self, size_bytes: int) -> memoryview:
        """Return a writable view of `size_bytes`; it is valid until the next `take`."""
        if size_bytes > len(self._memory):
            # In whole huge pages, so that a range a little larger than the last does not need another buffer.
            self._memory = aligned_buffer(_round_up(size_bytes, _HUGE_PAGE if size_bytes > _HUGE_PAGE else _PAGE))
        return self._memory[:size_bytes]


def aligned_buffer(size_bytes: int) -> memoryview:
    """Allocate zeroed memory in whole pages, huge ones where it fills them; freed with its last reference."""
    size_bytes = max(_PAGE, _round_up(size_bytes, _PAGE))
    if size_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, size_bytes))
    memory = mmap.mmap(-1, _round_up(size_bytes, _HUGE_PAGE) + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel without them
    start = -_address_of(memory) % _HUGE_PAGE
    return memoryview(memory)[start : start + size_bytes]


def _round_up(size_bytes: int, multiple: int) -> int:
    return -(-size_bytes // multiple) * multiple


def _address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class FileReader:
    """Reads half-open byte ranges of one regular file; safe to share between threads.

    `changed_error` is raised when the file is found to be other than it was at opening.
    """

    def __init__(
        self,
        path: Path,
        *,
        io: IoMode = "auto",
        changed_error: type[MmsplitError] = SourceChangedError,
    ) -> None:
        self.path = path
        self._changed_error = changed_error
        require_regular(path)
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        try:
            self.fingerprint = _fingerprint(os.fstat(self._fd))
            self.size_bytes = self.fingerprint.size_bytes
            self._lock = threading.Lock()
            self._direct_fd: int | None = None
            self._direct_is_refused = not hasattr(os, "O_DIRECT") or not hasattr(os, "RWF_NOWAIT")
            self._borrowed = 0
            self._returned = itertools.count(1)
            self._leased = False
            self._retiring = False
            self._map: mmap.mmap | None = None
            self._address = 0
            self._lends_views = io == "view"
            wanted = io != "pread" and self.size_bytes > 0 and can_populate()
            if io == "auto" and wanted:
                wanted = not is_network_file_system(self._fd)
            if wanted and (io == "view" or self._take_lease() or io == "mmap"):
                self._try_to_map()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def is_mapped(self) -> bool:
        """Whether ranges are slices of a map at this moment."""
        return self._map is not None and not self._retiring

    def fileno(self) -> int:
        """Return the descriptor, open for reading until `close`; for those who hand it to the kernel."""
        return self._fd

    @contextmanager
    def borrow(self, start: int, stop: int, scratch: Scratch, mode: ReadMode = "cached") -> Iterator[memoryview]:
        """Lend the bytes [start, stop) read-only, until the block ends.

        The view is a slice of the map or of `scratch`; neither may be used after the block.
        """
        self._require_range(start, stop)
        if mode == "direct":
            blocks = self._read_direct(start, stop, scratch)
            if blocks is not None:
                yield blocks.toreadonly()
                return
        mapped = self._enter_map() if stop > start else None
        if mapped is None:
            view = scratch.take(stop - start)
            self._read_into(view, start)
            yield view.toreadonly()
            return
        view = memoryview(mapped)[start:stop]
        try:
            self._populate(start, stop)
            yield view
        finally:
            view.release()
            self._drop(start, stop)
            del mapped
            self._leave_map()

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes [start, stop) into memory of their own; for headers and indexes."""
        self._require_range(start, stop)
        data = bytearray(stop - start)
        with memoryview(data) as view:
            self._read_into(view, start)
        return bytes(data)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read many small ranges, each as `read` does."""
        return [self.read(start, stop) for start, stop in ranges]

    def view_of_map(self, start: int, stop: int) -> memoryview | None:
        """Return [start, stop) where it lies, for as long as the view lives; None if the file is not mapped so.

        Only a reader opened with "view" has them: a lease could not be given back while they live.
        """
        if self._map is None or not self._lends_views:
            return None
        return memoryview(self._map)[start:stop]

    def populate(self, start: int, stop: int) -> None:
        """Fault in [start, stop) of a `view_of_map`, so that touching it does not wait for the disk.

        Raises if the bytes cannot be had any more; merely touching them would end the process then.
        """
        self._require_range(start, stop)
        if self._map is not None and self._lends_views and stop > start:
            self._populate(start, stop)

    def will_need(self, start: int, stop: int) -> None:
        """Ask the kernel to start reading [start, stop); returns at once."""
        length = min(stop, self.size_bytes) - start
        if (
            length > 0 and self._fd >= 0 and hasattr(os, "posix_fadvise")
        ):  # to the kernel, length 0 means: to the end of the file
            os.posix_fadvise(self._fd, start, length, os.POSIX_FADV_WILLNEED)

    def require_unchanged(self) -> None:
        """Raise if size, time or identity of the file, by handle or by name, differ from those at opening."""
        try:
            now, named = _fingerprint(os.fstat(self._fd)), _fingerprint(self.path.stat())
        except OSError as error:
            raise self._changed(f"file went away while it was read: {error.strerror}") from error
        for found in (now, named):
            if found != self.fingerprint:
                raise self._changed(
                    "file changed while it was read",
                    expected=_describe(self.fingerprint),
                    found=_describe(found),
                )

    def close(self) -> None:
        """Give up map, lease and file.  No borrowed range may be in use; a `view_of_map` keeps the map alive."""
        if self._fd >= 0:
            self._map = None  # unmapped with its last view
            if self._direct_fd is not None:
                os.close(self._direct_fd)
                self._direct_fd = None
            os.close(self._fd)  # closing gives the lease back
            self._fd = -1

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _require_range(self, start: int, stop: int) -> None:
        if self._fd < 0:
            raise RequestError("file is closed", path=self.path, hint="Read before closing it.")
        if not 0 <= start <= stop <= self.size_bytes:
            raise self._changed("range lies outside the file", stop)

    def _enter_map(self) -> mmap.mmap | None:
        with self._lock:
            self._heed_lease()
            if self._map is None or self._retiring:
                return None
            self._borrowed += 1
            return self._map

    def _heed_lease(self) -> None:
        """Begin to give map and lease back if somebody waits for the file."""
        if self._leased and not self._retiring and _lease_is_breaking(self._fd):
            self._retiring = True
            self._retire_if_idle()

    def _leave_map(self) -> None:
        with self._lock:
            self._borrowed -= 1
            self._retire_if_idle()

    def _retire_if_idle(self) -> None:
        """Give map and lease back once nobody uses them; the one who wants to write may then go on."""
        if self._retiring and self._borrowed == 0 and self._map is not None:
            self._map = None  # the last reference: unmapped here, before the lease goes
            _drop_lease(self._fd)
            self._leased = False

    def _take_lease(self) -> bool:
        self._leased = _take_read_lease(self._fd)
        return self._leased

    def _try_to_map(self) -> None:
        """Map the file; where that cannot be done (a file system without maps, truncated just now) it is read."""
        try:
            self._map, self._address = _map_file(self._fd, self.size_bytes)
        except (OSError, ValueError):
            if self._leased:
                _drop_lease(self._fd)
                self._leased = False

    def _populate(self, start: int, stop: int) -> None:
        first = start - start % _PAGE
        code = _madvise(self._address + first, stop - first, _MADV_POPULATE_READ)
        if code == errno.EFAULT:
            raise self._changed("bytes of the file can no longer be read; it was truncated, or its disk failed", start)
        if code:
            raise CheckpointError(f"cannot read: {os.strerror(code)}", path=self.path, offset=start)

    def _drop(self, start: int, stop: int) -> None:
        """Unmap the pages of the range, but for a last one that the next range is likely to begin in.

        A page dropped under a neighbour who is reading it comes back from the page cache: the lease keeps the file
        from being truncated meanwhile.  The kernel also maps pages around those it was asked for (64 KiB on tmpfs, a
        megabyte on ext4, measured); now and then the whole map is swept of them.
        """
        first, last = start - start % _PAGE, stop if stop == self.size_bytes else stop - stop % _PAGE
        if next(self._returned) % _SWEEP_EVERY == 0:
            first, last = 0, self.size_bytes
        if last > first:
            _madvise(self._address + first, last - first, _MADV_DONTNEED)

    def _read_direct(self, start: int, stop: int, scratch: Scratch) -> memoryview | None:
        """Read [start, stop) past the page cache; None if that cannot be done here, or is not worth it."""
        with self._lock:
            self._heed_lease()
        if stop - start < _LEAST_DIRECT_BYTES or self._direct_is_refused or self._is_cached(start, stop):
            return None
        fd = self._direct()
        if fd is None:
            return None
        first = start - start % _BLOCK
        blocks = scratch.take(_round_up(stop, _BLOCK) - first)
        done = 0
        while done < stop - first:
            try:
                count = os.preadv(fd, [blocks[done:]], first + done)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise self._cannot_read(error, first + done) from error
                self._direct_is_refused |= done == 0
                return None  # not known here, or a short read has left an offset that is no multiple
            if count == 0:
                return None  # reading by way of the cache tells what is wrong
            done += count
        return blocks[start - first : stop - first]

    def _is_cached(self, start: int, stop: int) -> bool:
        """Whether both ends of a range are in the page cache, and so, most likely, what is between them.

        Where the kernel cannot say, it is taken to be there.
        """
        try:
            for offset in (start, stop - 1):
                os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT)
        except OSError as error:
            return error.errno != errno.EAGAIN
        return True

    def _direct(self) -> int | None:
        """Return the descriptor that reads past the page cache, opened when it is first needed."""
        with self._lock:
            if self._direct_fd is None and not self._direct_is_refused:
                self._direct_fd = _open_direct(self.path, self.fingerprint)
                self._direct_is_refused = self._direct_fd is None
            return self._direct_fd

    def _read_into(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            try:
                count = _pread_into(self._fd, view[done:], start + done, self._lock)
            except OSError as error:
                raise self._cannot_read(error, start + done) from error
            if count == 0:
                raise self._changed("file ends early; it was truncated while it was read", start + done)
            done += count

    def _cannot_read(self, error: OSError, offset: int) -> CheckpointError:
        return CheckpointError(f"cannot read: {error.strerror}", path=self.path, offset=offset)

    def _changed(
        self, what: str, offset: int | None = None, *, expected: object = None, found: object = None
    ) -> MmsplitError:
        return self._changed_error(
            what,
            path=self.path,
            offset=offset,
            expected=expected,
            found=found,
            hint="Nothing wrong was written. Run again when nobody writes to the file.",
        )


def _fingerprint(stat: os.stat_result) -> Fingerprint:
    return Fingerprint(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev)


def fingerprint_of(path: Path) -> Fingerprint:
    """Fingerprint of the file `path` names, links followed."""
    return _fingerprint(path.stat())


def _describe(fingerprint: Fingerprint) -> str:
    """Say it for people; the inode tells apart what has been put in the place of another file of the same time."""
    seconds, fraction = divmod(fingerprint.mtime_ns, 10**9)
    try:
        when = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{fraction:09} UTC"
    except (OverflowError, ValueError, OSError):  # a file system keeps times that no calendar has
        when = f"{seconds} s after 1970"
    return f"{fingerprint.size_bytes:,} bytes, last written {when}, file number {fingerprint.inode}"


def _map_file(fd: int, size_bytes: int) -> tuple[mmap.mmap, int]:
    import numpy as np  # only to learn the address of a read-only map; planning never comes here

    mapped = mmap.mmap(fd, size_bytes, access=mmap.ACCESS_READ)
    return mapped, np.frombuffer(mapped, np.uint8).ctypes.data


def _open_direct(path: Path, fingerprint: Fingerprint) -> int | None:
    """Open a file for reading past the page cache; None if it cannot be, or if its name is another file's by now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None
    found = _fingerprint(os.fstat(fd))
    if (found.inode, found.device) == (fingerprint.inode, fingerprint.device):
        return fd
    os.close(fd)
    return None


def _pread_into(fd: int, view: memoryview, offset: int, lock: threading.Lock) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    with lock:  # Windows has one file position per handle
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(view))
        view[: len(data)] = data
        return len(data)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.madvise.restype = ctypes.c_int
    return libc


def _madvise(address: int, size_bytes: int, advice: int) -> int:
    """madvise(2) through ctypes, which releases the GIL while a cold disk is read; `mmap.madvise` holds it."""
    libc = _libc()
    while libc.madvise(address, size_bytes, advice) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            return code
    return 0


@functools.cache
def can_populate() -> bool:
    """Whether this kernel knows MADV_POPULATE_READ; without it a map is never safe to touch."""
    if not sys.platform.startswith("linux"):
        return False
    page = mmap.mmap(-1, _PAGE)
    return _madvise(_address_of(page), _PAGE, _MADV_POPULATE_READ) == 0


def _take_read_lease(fd: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    try:
        # A lease that is broken is announced by a signal, SIGIO unless told otherwise, and SIGIO kills.
        # SIGURG is ignored by default; we ask (`_lease_is_breaking`) instead of listening.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    return True


def _lease_is_breaking(fd: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETLEASE) != fcntl.F_RDLCK


def _drop_lease(fd: int) -> None:
    if sys.platform.startswith("linux"):
        import fcntl

        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError:
            pass  # the kernel took it back already (/proc/sys/fs/lease-break-time)
