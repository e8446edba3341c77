"""The file that many threads write to: the same bytes with O_DIRECT, without it, and where it stops working."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import open_descriptors

from mmsplit.checkpoint import Scratch
from mmsplit.errors import NoSpaceError, OutputError
from mmsplit.sidecar.payload_file import PayloadFile

_BLOCK = 64 << 10
_SHM = Path("/dev/shm")

direct_only = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs O_DIRECT")


def _block(number: int, scratch: Scratch) -> memoryview:
    block = scratch.take(_BLOCK)
    block[:] = bytes([number % 251]) * _BLOCK
    return block


def _write_in_threads(file: PayloadFile, count: int = 12) -> None:
    def write(first: int) -> None:
        scratch = Scratch()
        for number in range(first, count, 3):
            file.write_block(4096 + number * _BLOCK, _block(number, scratch))

    threads = [threading.Thread(target=write, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    file.write(0, b"head".ljust(4096, b"\0"))
    for thread in threads:
        thread.join()


def _expected(count: int = 12) -> bytes:
    return b"head" + bytes(4092) + b"".join(bytes([number % 251]) * _BLOCK for number in range(count))


def _finish(file: PayloadFile, path: Path) -> None:
    file.finish(len(_expected()))
    file.close()
    file.close()
    assert path.read_bytes() == _expected()


@pytest.mark.parametrize("direct", [True, False])
def test_blocks_land_where_they_belong(tmp_path: Path, direct: bool) -> None:
    """Blocks by several threads and small writes between them, on the file system at hand."""
    path = tmp_path / "file"
    path.write_bytes(b"older and longer" * 200_000)
    file = PayloadFile(path, direct=direct)
    assert direct or not file.is_direct
    _write_in_threads(file)
    buffer = memoryview(bytearray(10))
    file.read_back(4090, buffer)
    assert buffer == _expected()[4090:4100]
    _finish(file, path)


@pytest.mark.skipif(not os.access(_SHM, os.W_OK), reason="needs a tmpfs at /dev/shm")
def test_on_a_file_system_in_memory() -> None:
    """A tmpfs, which takes O_DIRECT or not as the kernel's version will have it."""
    path = _SHM / f"mmsplit-test-{os.getpid()}"
    try:
        file = PayloadFile(path)
        _write_in_threads(file)
        _finish(file, path)
    finally:
        path.unlink(missing_ok=True)


@direct_only
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_o_direct_refused_at_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A file system without it is found out by trying, and written through the cache."""
    real = os.open

    def refuse(path: Any, flags: int, *args: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", refuse)
    file = PayloadFile(tmp_path / "file")
    assert not file.is_direct
    _write_in_threads(file)
    _finish(file, tmp_path / "file")


@direct_only
@pytest.mark.parametrize("after", [0, 5])
def test_o_direct_refused_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Some take it at opening and refuse it later: the block goes through the cache, and no descriptor is left."""
    before = open_descriptors()
    file = PayloadFile(tmp_path / "file")
    direct_fd = file._direct_fd
    if direct_fd is None:
        pytest.skip("no O_DIRECT on this file system")
    real, lock, calls = os.pwrite, threading.Lock(), [0]

    def refuse(fd: int, data: memoryview, offset: int) -> int:
        if fd == direct_fd:
            with lock:
                calls[0] += 1
                if calls[0] > after:
                    raise OSError(errno.EINVAL, "refused")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    _write_in_threads(file)
    assert not file.is_direct
    _finish(file, tmp_path / "file")
    assert open_descriptors() == before


@direct_only
def test_a_short_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take a part of a block, at any offset: the rest follows."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: max(1, len(data) // 2)], offset))
    file = PayloadFile(tmp_path / "file")
    _write_in_threads(file)
    _finish(file, tmp_path / "file")


def _fail(code: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, NoSpaceError), (errno.EIO, OutputError)])
@pytest.mark.parametrize("call", ["pwrite", "preadv", "ftruncate", "fsync", "open"])
def test_refusals_become_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int, kind: type[OutputError]
) -> None:
    """Whatever the system says no to, the error names the file."""
    path = tmp_path / "file"
    file = PayloadFile(path)
    file.write(0, b"x")
    monkeypatch.setattr(os, call, _fail(code))
    with pytest.raises(kind, match=f"{path}: cannot write"):
        {
            "pwrite": lambda: file.write_block(0, Scratch().take(4096)),
            "preadv": lambda: file.read_back(0, memoryview(bytearray(1))),
            "ftruncate": lambda: file.finish(1),
            "fsync": lambda: file.finish(1),
            "open": lambda: PayloadFile(path),
        }[call]()
    monkeypatch.undo()
    file.close()


def test_reading_back_more_than_there_is(tmp_path: Path) -> None:
    """A file that somebody truncated is an error, not zeros."""
    file = PayloadFile(tmp_path / "file")
    file.write(0, b"abc")
    with pytest.raises(OutputError, match="shorter than what was written"):
        file.read_back(1, memoryview(bytearray(3)))
    file.close()
