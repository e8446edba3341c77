"""Ranges of local files: mapped or read, always the right bytes, and never a crash when the file changes."""

import errno
import mmap
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from mmsplit.checkpoint import FileReader, IoMode, Scratch, aligned_buffer, file_reader, file_system
from mmsplit.errors import CheckpointError, IntegrityError, RequestError, SourceChangedError

PAGE = mmap.PAGESIZE
DATA = np.random.default_rng(0).integers(0, 256, 5 * PAGE + 123, np.uint8).tobytes()

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps and leases are for Linux")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of a little more than five pages of noise."""
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def leased(path: Path) -> FileReader:
    """A reader that maps its file under a lease; where none is to be had the test means nothing."""
    reader = FileReader(path)
    if not reader.is_mapped:
        reader.close()
        pytest.skip("no lease on this file system, or for this user")
    yield reader
    reader.close()


def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what every system has: no map, no lease, one file position per handle, no advice."""
    monkeypatch.setattr(file_reader, "can_populate", lambda: False)
    monkeypatch.setattr(file_reader, "_take_read_lease", lambda _: False)
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)


RANGES = {
    "nothing": (0, 0),
    "nothing at the end": (len(DATA), len(DATA)),
    "first byte": (0, 1),
    "last byte": (len(DATA) - 1, len(DATA)),
    "all": (0, len(DATA)),
    "one page": (PAGE, 2 * PAGE),
    "across an edge": (PAGE - 1, PAGE + 1),
    "just before an edge": (PAGE - 3, PAGE),
    "just after an edge": (PAGE, PAGE + 3),
    "odd": (PAGE + 7, 4 * PAGE - 5),
    "last partial page": (5 * PAGE, len(DATA)),
}
MODES: list[IoMode | str] = ["auto", "mmap", "pread", "view", "portable"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("start", "stop"), RANGES.values(), ids=RANGES)
def test_borrowed_bytes_are_those_of_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, start: int, stop: int
) -> None:
    """On every path, twice in a row, read-only; `read` gives the same."""
    if mode == "portable":
        portable(monkeypatch)
    with FileReader(path, io="auto" if mode == "portable" else mode) as reader:
        scratch = Scratch()
        for _ in range(2):
            with reader.borrow(start, stop, scratch) as view:
                assert view.readonly
                assert bytes(view) == DATA[start:stop]
        assert reader.read(start, stop) == DATA[start:stop]
        reader.will_need(start, stop)
        reader.require_unchanged()


@pytest.mark.parametrize("mode", MODES)
def test_range_outside_the_file_is_an_error_not_a_shorter_view(
    path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A slice of a map past its end would be clipped in silence."""
    if mode == "portable":
        portable(monkeypatch)
    with FileReader(path, io="auto" if mode == "portable" else mode) as reader:
        for start, stop in ((0, len(DATA) + 1), (len(DATA) + 1, len(DATA) + 1), (-1, 5), (5, 4)):
            with pytest.raises(SourceChangedError, match="outside the file"), reader.borrow(start, stop, Scratch()):
                pass
            with pytest.raises(SourceChangedError, match="outside the file"):
                reader.read(start, stop)


@pytest.mark.parametrize("mode", ["auto", "mmap", "pread", "view"])
def test_closed_reader_says_so(path: Path, mode: IoMode) -> None:
    """Even for an empty range: the mistake is the caller's, not the file's."""
    reader = FileReader(path, io=mode)
    reader.close()
    for stop in (0, 5):
        with pytest.raises(RequestError, match="closed"):
            reader.read(0, stop)
        with pytest.raises(RequestError, match="closed"), reader.borrow(0, stop, Scratch()):
            pass


@pytest.mark.parametrize("mode", ["auto", "mmap", "pread", "view"])
def test_empty_file_can_be_opened(tmp_path: Path, mode: IoMode) -> None:
    """It cannot be mapped, and need not be."""
    (tmp_path / "empty").touch()
    with FileReader(tmp_path / "empty", io=mode) as reader:
        assert (reader.size_bytes, reader.is_mapped, reader.read(0, 0)) == (0, False, b"")
        assert reader.view_of_map(0, 0) is None
        with reader.borrow(0, 0, Scratch()) as view:
            assert len(view) == 0


def test_scratch_grows_and_stays_aligned() -> None:
    """One buffer, as large as the largest range so far, on a page."""
    scratch = Scratch()
    first = scratch.take(10)
    first[:] = b"0123456789"
    big = scratch.take(3 * PAGE + 1)
    assert len(big) == 3 * PAGE + 1
    assert np.frombuffer(big, np.uint8).ctypes.data % PAGE == 0
    assert bytes(first) == b"0123456789"  # nobody's view is pulled away
    assert np.shares_memory(np.frombuffer(scratch.take(5), np.uint8), np.frombuffer(big, np.uint8))
    assert len(scratch.take(0)) == 0
    assert len(aligned_buffer(0)) == PAGE
    assert len(aligned_buffer(PAGE)) == PAGE
    assert len(aligned_buffer(PAGE + 1)) == 2 * PAGE


# --- Past the page cache ----------------------------------------------------------------------------------------

direct_only = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="reads past the page cache are for Linux")
LARGE = np.random.default_rng(1).integers(0, 256, (1 << 20) + 123, np.uint8).tobytes()


@pytest.fixture
def uncached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of a megabyte of which the page cache is said to have nothing."""
    path = tmp_path / "large"
    path.write_bytes(LARGE)
    monkeypatch.setattr(FileReader, "_is_cached", lambda *_: False)
    return path


def _direct_fds(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Collect the descriptors that are opened with O_DIRECT."""
    opened: set[int] = set()
    real = os.open

    def note(path: object, flags: int, *rest: int) -> int:
        fd = real(path, flags, *rest)
        if flags & os.O_DIRECT:
            opened.add(fd)
        return fd

    monkeypatch.setattr(os, "open", note)
    return opened


@direct_only
@pytest.mark.parametrize("mode", ["auto", "mmap", "pread", "view"])
@pytest.mark.parametrize(
    ("start", "stop"), [(0, 1 << 20), (1, 300_000), (4096, 4096 + 262_144), (5000, len(LARGE)), (700_001, len(LARGE))]
)
def test_direct_reads_give_the_same_bytes(
    uncached: Path, monkeypatch: pytest.MonkeyPatch, mode: IoMode, start: int, stop: int
) -> None:
    """On blocks or across them, up to the end of the file, which ends in the middle of one."""
    opened = _direct_fds(monkeypatch)
    with FileReader(uncached, io=mode) as reader, reader.borrow(start, stop, Scratch(), "direct") as view:
        assert view.readonly
        assert bytes(view) == LARGE[start:stop]
    assert opened or not _knows_o_direct(uncached)


def _knows_o_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@direct_only
def test_what_is_cached_or_small_is_not_read_past_the_cache(
    uncached: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it would be slower."""
    opened = _direct_fds(monkeypatch)
    with FileReader(uncached) as reader, reader.borrow(0, 100_000, Scratch(), "direct") as view:
        assert bytes(view) == LARGE[:100_000]
    monkeypatch.setattr(FileReader, "_is_cached", lambda *_: True)
    with FileReader(uncached) as reader, reader.borrow(0, 1 << 20, Scratch(), "direct") as view:
        assert bytes(view) == LARGE[: 1 << 20]
    assert opened == set()


@direct_only
def test_what_the_kernel_cannot_say_is_taken_to_be_cached(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGAIN is the one answer that means no."""
    real = os.preadv
    for code, cached in ((errno.EAGAIN, False), (errno.EOPNOTSUPP, True)):

        def preadv(fd: int, views: list[bytearray], offset: int, *flags: int, code: int = code) -> int:
            if flags:
                raise OSError(code, os.strerror(code))
            return real(fd, views, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        with FileReader(path, io="pread") as reader:
            assert reader._is_cached(0, 100) is cached
    monkeypatch.undo()
    with FileReader(path, io="pread") as reader:
        assert reader._is_cached(0, len(DATA))  # just written, by way of the cache


@direct_only
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("at", ["opening", "reading"])
def test_a_file_system_without_direct_reads(
    uncached: Path, monkeypatch: pytest.MonkeyPatch, code: int, at: str
) -> None:
    """It is read by way of the cache, and not asked again."""
    asked = []
    real_open, real_read = os.open, os.preadv

    def refuse_open(path: object, flags: int, *rest: int) -> int:
        if at == "opening" and flags & os.O_DIRECT:
            asked.append(path)
            raise OSError(code, os.strerror(code))
        return real_open(path, flags & ~os.O_DIRECT, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse_open)
        with FileReader(uncached, io="pread") as reader:

            def refuse_read(fd: int, views: list[memoryview], offset: int) -> int:
                if at == "reading" and fd == reader._direct_fd:
                    asked.append(fd)
                    raise OSError(code, os.strerror(code))
                return real_read(fd, views, offset)

            patch.setattr(os, "preadv", refuse_read)
            for _ in range(3):
                with reader.borrow(7, 1 << 20, Scratch(), "direct") as view:
                    assert bytes(view) == LARGE[7 : 1 << 20]
    assert len(asked) == 1


@direct_only
def test_a_direct_read_that_comes_short_is_completed(uncached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After whole blocks past the cache, after anything else by way of it."""
    real = os.preadv
    for at_most in (8192, 5001):
        monkeypatch.setattr(os, "preadv", lambda fd, views, offset, n=at_most: real(fd, [views[0][:n]], offset))
        with FileReader(uncached, io="pread") as reader, reader.borrow(9, 900_000, Scratch(), "direct") as view:
            assert bytes(view) == LARGE[9:900_000]


@direct_only
def test_a_truncated_file_is_an_error_past_the_cache_too(uncached: Path) -> None:
    """Not fewer bytes, and not the scratch buffer's old ones."""
    with FileReader(uncached, io="pread") as reader:
        os.truncate(uncached, 500_000)
        with (
            pytest.raises(SourceChangedError, match="truncated while it was read"),
            reader.borrow(0, 1 << 20, Scratch(), "direct"),
        ):
            pass


@direct_only
def test_a_disk_that_fails_past_the_cache(uncached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is an error with path and offset, not a reason to try it the other way."""

    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with FileReader(uncached, io="pread") as reader:
        monkeypatch.setattr(os, "preadv", fail)
        with (
            pytest.raises(CheckpointError, match="cannot read") as caught,
            reader.borrow(5000, 1 << 20, Scratch(), "direct"),
        ):
            pass
        assert (caught.value.path, caught.value.offset) == (str(uncached), 4096)


@direct_only
def test_a_name_that_is_another_files_by_now(uncached: Path) -> None:
    """The file that was opened is read on, whatever its name stands for."""
    with FileReader(uncached, io="pread") as reader:
        other = uncached.with_name("other")
        other.write_bytes(bytes(len(LARGE)))
        os.replace(other, uncached)
        with reader.borrow(0, 1 << 20, Scratch(), "direct") as view:
            assert bytes(view) == LARGE[: 1 << 20]


@direct_only
def test_direct_reads_heed_the_lease(uncached: Path) -> None:
    """Who reads nothing by the map must look all the same whether somebody waits for the file."""
    with FileReader(uncached) as reader:
        if not reader.is_mapped:
            pytest.skip("no lease on this file system, or for this user")
        assert not try_to_write(uncached)
        with reader.borrow(0, 1 << 20, Scratch(), "direct") as view:
            assert bytes(view) == LARGE[: 1 << 20]
        assert not reader.is_mapped
        assert try_to_write(uncached)


def test_large_buffers_start_on_huge_pages() -> None:
    """And have the length that was asked for, in pages."""
    for size in (2 << 20, (4 << 20) + 1):
        buffer = aligned_buffer(size)
        assert len(buffer) == -(-size // PAGE) * PAGE
        if hasattr(mmap, "MADV_HUGEPAGE"):
            assert np.frombuffer(buffer, np.uint8).ctypes.data % (2 << 20) == 0
        buffer[0] = buffer[-1] = 1


@linux
def test_populate_brings_the_pages_of_a_view(path: Path) -> None:
    """They are resident then; those of a file that lost them are an error instead of a crash."""
    with FileReader(path, io="view") as reader:
        view = reader.view_of_map(0, len(DATA))
        assert view is not None
        assert resident_bytes(path) == 0
        reader.populate(PAGE, 3 * PAGE)
        assert resident_bytes(path) >= 2 * PAGE
        reader.populate(5, 5)
        with pytest.raises(SourceChangedError, match="outside the file"):
            reader.populate(0, len(DATA) + 1)
        os.truncate(path, PAGE)
        with pytest.raises(SourceChangedError, match="can no longer be read"):
            reader.populate(0, len(DATA))
        del view


# --- Reading goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no preadv here")
@pytest.mark.parametrize("at_most", [1, 7, PAGE])
def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch, at_most: int) -> None:
    """A file system may return less than was asked for."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: real(fd, [views[0][:at_most]], offset))
    with FileReader(path, io="pread") as reader, reader.borrow(3, PAGE + 50, Scratch()) as view:
        assert bytes(view) == DATA[3 : PAGE + 50]


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no preadv here")
def test_read_error_of_the_disk_names_file_and_offset(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO in the second read of a range."""
    real = os.preadv

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        if offset >= 100:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, [views[0][:100]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    with FileReader(path, io="pread") as reader, pytest.raises(CheckpointError, match="cannot read") as caught:
        reader.read(0, 200)
    assert (caught.value.path, caught.value.offset) == (str(path), 100)


@linux
@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (errno.EFAULT, SourceChangedError, "can no longer be read"),
        (errno.EHWPOISON if hasattr(errno, "EHWPOISON") else 133, CheckpointError, "cannot read"),
    ],
)
def test_pages_that_cannot_be_had_are_an_error_of_ours(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[CheckpointError], words: str
) -> None:
    """Whatever madvise(2) answers, no bare OSError comes out, and the reader can still be closed."""
    with FileReader(path, io="mmap") as reader:
        monkeypatch.setattr(file_reader, "_madvise", lambda *_: code)
        with pytest.raises(error, match=words) as caught, reader.borrow(10, 20, Scratch()):
            pass
        assert type(caught.value) is error
        assert caught.value.offset == 10


@linux
def test_file_that_cannot_be_mapped_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without maps; the lease, of no use now, holds nobody up."""

    def refuse(*args: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(file_reader, "_map_file", refuse)
    with FileReader(path) as reader:
        assert not reader.is_mapped
        with reader.borrow(1, 9, Scratch()) as view:
            assert bytes(view) == DATA[1:9]
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_changed_error_is_the_callers(path: Path) -> None:
    """A partition file is not a source; its reader raises what the caller chose."""
    with FileReader(path, io="pread", changed_error=IntegrityError) as reader:
        os.truncate(path, 10)
        with pytest.raises(IntegrityError, match="truncated while it was read") as caught:
            reader.read(0, 20)
        assert caught.value.offset == 10
        with pytest.raises(IntegrityError, match="changed"):
            reader.require_unchanged()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems round times")
def test_what_changed_is_said_for_people(path: Path) -> None:
    """Size and time; also a time that no calendar has."""
    os.utime(path, ns=(0, 1_000_000_005))
    with FileReader(path, io="pread") as reader:
        os.utime(path, ns=(0, 0))
        with pytest.raises(SourceChangedError, match=r"last written 1970-01-01 00:00:01\.000000005 UTC, .*00:00:00\.0"):
            reader.require_unchanged()
        reader.fingerprint = reader.fingerprint._replace(mtime_ns=10**21)
        with pytest.raises(SourceChangedError, match=r"last written 1000000000000 s after 1970"):
            reader.require_unchanged()


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _other_time(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def _other_file(path: Path) -> None:
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(DATA)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


CHANGES = {
    "grown": (_grow, "changed while it was read"),
    "shrunk": (lambda path: os.truncate(path, 5), "changed while it was read"),
    "touched": (_other_time, "changed while it was read"),
    "replaced by an equal file": (_other_file, "changed while it was read"),
    "deleted": (lambda path: path.unlink(), "went away"),
}


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be replaced or deleted there")
@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_change_of_the_file_is_noticed(path: Path, change: Callable[[Path], None], words: str) -> None:
    """By handle or by name."""
    with FileReader(path, io="pread") as reader:
        reader.require_unchanged()
        change(path)
        with pytest.raises(SourceChangedError, match=words) as caught:
            reader.require_unchanged()
        assert caught.value.path == str(path)
        assert "Run again" in str(caught.value)


def test_will_need_asks_for_the_range_and_no_more(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the kernel a length of 0 means the rest of the file; an empty tensor must not ask for that."""
    asked = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, *range_and_advice: asked.append(range_and_advice[:2]), raising=False
    )
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    with FileReader(path) as reader:
        for start, stop in ((5, 5), (len(DATA), len(DATA)), (len(DATA) + 5, len(DATA) + 9), (5, 9), (9, len(DATA) + 9)):
            reader.will_need(start, stop)
    assert asked == [(5, 4), (9, len(DATA) - 9)]


# --- Maps and leases --------------------------------------------------------------------------------------------


def resident_bytes(path: Path) -> int:
    """How much of the maps of a file is resident in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and first == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


@linux
@pytest.mark.parametrize("step", [256 * PAGE, 100 * PAGE + 1, 777, -4096])
def test_resident_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Ranges in order or backwards, on pages or across: what is left after a sweep is next to nothing."""
    path = tmp_path / "large"
    path.write_bytes(bytes(2048 * PAGE + 10))
    with FileReader(path, io="mmap") as reader:
        size, largest = reader.size_bytes, 0
        starts = range(0, size, step) if step > 0 else range(size + step, 0, step)
        with reader.borrow(0, size, Scratch()):
            assert resident_bytes(path) >= size
        assert resident_bytes(path) == 0
        for turn, start in enumerate([*starts][: 20 * file_reader._SWEEP_EVERY], 2):
            with reader.borrow(start, min(start + abs(step), size), Scratch()) as view:
                view[0]
            if turn % file_reader._SWEEP_EVERY == 0:
                largest = max(largest, resident_bytes(path))
        assert largest == 0
        monkeypatch.setattr(file_reader, "_SWEEP_EVERY", 1)
        with reader.borrow(size - 3, size, Scratch()):
            pass
        assert resident_bytes(path) == 0


@linux
def test_neighbours_may_share_a_page(path: Path) -> None:
    """Returning one range does not harm another that begins in its last page, or ends in its first."""
    with FileReader(path, io="mmap") as reader:
        a, b, c = (0, PAGE + 10), (PAGE + 10, 2 * PAGE + 10), (2 * PAGE + 10, 3 * PAGE)
        with reader.borrow(*a, Scratch()) as first, reader.borrow(*c, Scratch()) as last:
            with reader.borrow(*b, Scratch()) as middle:
                assert bytes(middle) == DATA[slice(*b)]
            assert bytes(first) == DATA[slice(*a)]
            assert bytes(last) == DATA[slice(*c)]


def try_to_write(path: Path) -> bool:
    """Open a file for writing, without waiting for leases; a refusal asks the holder to give its lease back."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except BlockingIOError:
        return False
    return True


@linux
def test_writer_gets_the_file_after_the_views_in_flight(path: Path, leased: FileReader) -> None:
    """While a view lives the writer waits; others read from then on; with the last view the lease goes."""
    assert not try_to_write(path)
    # The break is noticed at the next borrow: nothing is in flight, so the lease goes at once and this is a read.
    with leased.borrow(0, 10, Scratch()) as view:
        assert bytes(view) == DATA[:10]
    assert not leased.is_mapped
    assert try_to_write(path)
    leased.require_unchanged()


@linux
def test_lease_outlives_views_in_flight(path: Path, leased: FileReader) -> None:
    """Two views on the map, a break in between, and a third that is read: the lease goes with the last mapped one."""
    with leased.borrow(0, PAGE, Scratch()) as one:
        with leased.borrow(PAGE, 2 * PAGE, Scratch()) as two:
            assert not try_to_write(path)
            with leased.borrow(5, 10, Scratch()) as three:
                assert bytes(three) == DATA[5:10]
            assert not leased.is_mapped
            assert bytes(two) == DATA[PAGE : 2 * PAGE]
        assert not try_to_write(path)
        assert bytes(one) == DATA[:PAGE]
    assert try_to_write(path)


@linux
def test_no_map_while_somebody_has_the_file_open_for_writing(path: Path) -> None:
    """No lease, no map; reading works."""
    with path.open("r+b"), FileReader(path) as reader:
        assert not reader.is_mapped
        assert reader.read(0, 10) == DATA[:10]


@linux
def test_close_gives_the_lease_back(path: Path, leased: FileReader) -> None:
    """Twice is once."""
    leased.close()
    leased.close()
    assert try_to_write(path)


@linux
def test_views_that_outlive_the_reader_need_a_map_without_lease(path: Path, leased: FileReader) -> None:
    """A lease could not be given back while they live; without one, they keep the map alive."""
    assert leased.view_of_map(0, 5) is None
    leased.close()
    with FileReader(path, io="view") as reader:
        view = reader.view_of_map(3, 9)
    assert view is not None
    assert bytes(view) == DATA[3:9]
    with FileReader(path, io="pread") as reader:
        assert reader.view_of_map(0, 5) is None


def run_victim(path: Path, body: str, attack: Callable[[], None], *arguments: str) -> str:
    """Run `body` in a process of its own with `reader` open; attack when it is ready; return what it says.

    A process of its own, since what is tested for is death by SIGBUS.
    """
    script = "import sys, threading\nfrom pathlib import Path\nimport numpy as np\n"
    script += "from mmsplit.checkpoint import FileReader, Scratch\nfrom mmsplit.errors import SourceChangedError\n"
    script += "path = Path(sys.argv[1])\n" + textwrap.dedent(body)
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdin is not None
        assert victim.stdout is not None
        state = victim.stdout.readline()
        if state == "no lease\n":
            pytest.skip("no lease on this file system, or for this user")
        assert state == "ready\n"
        attack()
        out, _ = victim.communicate("attacked\n", timeout=50)
        assert victim.returncode == 0, out
    return out.strip()


_READ_ALL_THE_TIME = """
    reader = FileReader(path)
    print("ready" if reader.is_mapped else "no lease", flush=True)
    errors = []
    def read():
        scratch = Scratch()
        try:
            while True:
                for start in range(0, reader.size_bytes, 70_001):
                    stop = min(start + 70_001, reader.size_bytes)
                    with reader.borrow(start, stop, scratch) as view:
                        if np.frombuffer(view, np.uint8).max() > 7:
                            errors.append("garbage")
                            return
        except SourceChangedError as error:
            errors.append(type(error).__name__)
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(*sorted(set(errors)), len(errors), reader.is_mapped)
"""


@linux
def test_truncation_by_another_process_is_an_error_not_a_crash(tmp_path: Path) -> None:
    """Four threads read through the map all the while; each of them ends with the same error."""
    path = tmp_path / "file"
    path.write_bytes(bytes([7]) * 3_000_000)
    assert run_victim(path, _READ_ALL_THE_TIME, lambda: os.truncate(path, 100)) == "SourceChangedError 4 False"


@linux
def test_file_opened_for_truncation_by_another_process_is_an_error_not_a_crash(tmp_path: Path) -> None:
    """The way in which most programs write a file anew."""
    path = tmp_path / "file"
    path.write_bytes(bytes([7]) * 3_000_000)
    assert run_victim(path, _READ_ALL_THE_TIME, lambda: path.open("wb").close()) == "SourceChangedError 4 False"


@linux
def test_file_overwritten_by_another_process_is_read_and_found_changed(tmp_path: Path) -> None:
    """The writer waits for the view in flight, then gets the file; the victim goes on reading and can tell."""
    path = tmp_path / "file"
    path.write_bytes(bytes([7]) * 100_000)
    body = """
        reader = FileReader(path)
        with reader.borrow(0, 50_000, Scratch()) as view:
            print("ready" if reader.is_mapped else "no lease", flush=True)
            sys.stdin.readline()
            print(bytes(view) == bytes([7]) * 50_000, end=" ")
        with reader.borrow(0, 50_000, Scratch()) as view:
            print(reader.is_mapped, end=" ")
        while path.stat().st_mtime_ns == reader.fingerprint.mtime_ns:
            pass
        try:
            reader.require_unchanged()
        except SourceChangedError as error:
            print(type(error).__name__)
    """

    def overwrite() -> None:
        with path.open("r+b") as file:
            file.write(b"8")

    writer = threading.Thread(target=overwrite)

    def attack() -> None:
        while try_to_write(path):  # only to be sure that the writer below meets the lease
            pass
        writer.start()

    assert run_victim(path, body, attack) == "True False SourceChangedError"
    writer.join()


@linux
@pytest.mark.parametrize("mode", ["mmap", "view"])
def test_truncation_without_a_lease_is_an_error_at_the_next_borrow(tmp_path: Path, mode: str) -> None:
    """A range that is gone is no crash, though nobody kept the file from being truncated."""
    path = tmp_path / "file"
    path.write_bytes(bytes([7]) * 100_000)
    body = """
        reader = FileReader(path, io=sys.argv[2])
        print("ready" if reader.is_mapped else "not mapped", flush=True)
        sys.stdin.readline()
        try:
            with reader.borrow(0, 100_000, Scratch()) as view:
                np.frombuffer(view, np.uint8).max()
        except SourceChangedError as error:
            print(type(error).__name__)
    """
    with path.open("r+b") if mode == "mmap" else nullcontext():  # held open for writing: no lease
        assert run_victim(path, body, lambda: os.truncate(path, 10), mode) == "SourceChangedError"


@linux
def test_a_file_system_of_others_is_read_unless_maps_are_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease of this kernel does not bind a server: what the file system is decides, and the user over it."""
    for name, is_mapped in {0x6969: False, 0x65735546: False, 0xFF534D42: False, 0xEF53: True}.items():
        monkeypatch.setattr(file_system, "file_system_type", lambda _, name=name: name)
        with FileReader(path) as reader:
            assert reader.is_mapped == is_mapped
            assert reader.read(0, 9) == DATA[:9]
        with FileReader(path, io="mmap") as reader:
            assert reader.is_mapped
        with FileReader(path, io="pread") as reader:
            assert not reader.is_mapped


@linux
@pytest.mark.parametrize(("name", "kind"), [("/proc/self/status", 0x9FA0), ("/sys/kernel/uevent_seqnum", 0x62656572)])
def test_the_kernel_tells_the_file_system(name: str, kind: int) -> None:
    """Two that every Linux has say who they are."""
    if not Path(name).exists():
        pytest.skip("not here")
    with Path(name).open("rb") as file:
        assert file_system.file_system_type(file.fileno()) == kind


@linux
def test_maps_that_are_asked_for_are_under_a_lease_where_there_is_one(path: Path, leased: FileReader) -> None:
    """Who asks for maps does not give up the guard: a writer waits, and then gets the file."""
    leased.close()
    with FileReader(path, io="mmap") as reader:
        assert reader.is_mapped
        assert reader.view_of_map(0, 5) is None
        assert not try_to_write(path)
        with reader.borrow(0, 9, Scratch()) as view:
            assert bytes(view) == DATA[:9]
        assert not reader.is_mapped
        assert try_to_write(path)


@linux
def test_threads_may_borrow_while_the_lease_is_broken(path: Path, leased: FileReader) -> None:
    """Some get the map, some the scratch; all get the bytes, and the writer gets the file."""
    wrong: list[object] = []
    go = threading.Event()

    def read(seed: int) -> None:
        rng, scratch = np.random.default_rng(seed), Scratch()
        try:
            for turn in range(300):
                start, stop = sorted(rng.integers(0, len(DATA), 2).tolist())
                with leased.borrow(start, stop, scratch) as view:
                    if bytes(view) != DATA[start:stop]:
                        wrong.append((start, stop))
                if turn == 50:
                    go.set()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    go.wait()
    os.close(os.open(path, os.O_WRONLY))  # waits for the lease
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not leased.is_mapped
