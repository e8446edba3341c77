"""Sharing blocks: refusals are "no", failing disks are errors, and what is shared is what was asked for."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest

from mmsplit.errors import OutputError
from mmsplit.sidecar import block_sharing
from mmsplit.sidecar.block_sharing import Twin, copy_blocks
from mmsplit.sidecar.payload_file import PayloadFile

BLOCK = 4096


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three blocks, each of another byte."""
    path = tmp_path / "source"
    path.write_bytes(b"a" * BLOCK + b"b" * BLOCK + b"c" * BLOCK)
    return path


def _write(source: Path, target: Path) -> tuple[bytes, bool | None]:
    """Write the second block of the source as the third of the target, by its twin if that can be."""
    file = PayloadFile(target, direct=False)
    fd = os.open(source, os.O_RDONLY)
    try:
        twin = Twin(fd, BLOCK)
        file.write_block(2 * BLOCK, memoryview(bytearray(b"b" * BLOCK)), twin)
        file.finish(3 * BLOCK)
    finally:
        os.close(fd)
        file.close()
    return target.read_bytes(), twin.is_shared


@pytest.mark.parametrize("way", ["clone", "server", "none", "as it is here"])
def test_the_block_is_there_whichever_way(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Cloned, copied by a file server, or written; the same bytes at the same place."""
    asked = []

    def ioctl(fd: int, request: int, argument: bytes) -> int:
        source_fd, start, size, offset = struct.unpack("=qQQQ", argument)
        asked.append((request, start, size, offset))
        if way != "clone":
            raise OSError(errno.EOPNOTSUPP, "no")
        copy_blocks(source_fd, start, fd, offset, size)
        return 0

    if way != "as it is here":
        monkeypatch.setattr(fcntl, "ioctl", ioctl)
        monkeypatch.setattr(block_sharing, "is_network_file_system", lambda _: way == "server")
    found, is_shared = _write(source, tmp_path / "target")
    assert found == bytes(2 * BLOCK) + b"b" * BLOCK
    if way != "as it is here":
        assert is_shared is (way != "none")
        assert asked == [(0x4020940D, BLOCK, BLOCK, 2 * BLOCK)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_failing_disk_is_an_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It is not taken for a file system that cannot share."""

    def ioctl(*_: object) -> int:
        raise OSError(number, "disk")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with pytest.raises(OutputError):
        _write(source, tmp_path / "target")


def test_source_that_became_shorter_is_an_error(source: Path, tmp_path: Path) -> None:
    """The kernel would copy what there is, and say how much."""
    fd = os.open(source, os.O_RDONLY)
    target_fd = os.open(tmp_path / "target", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="shorter"):
            copy_blocks(fd, 2 * BLOCK, target_fd, 0, 2 * BLOCK)
    finally:
        os.close(fd)
        os.close(target_fd)
