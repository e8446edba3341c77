"""A name stands for the whole of a file or is not there; what the system refuses becomes our error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from checkpoints import open_descriptors, tree

from mmsplit.errors import NoSpaceError, OutputError
from mmsplit.sidecar.output_files import output_errors, sync_directory, write_all, write_whole_file


def test_a_whole_file(tmp_path: Path) -> None:
    """Written and replaced under its name, and nothing beside it."""
    for data in (b"", b"first", b"the second is longer", b"3"):
        write_whole_file(tmp_path / "a", data)
        assert tree(tmp_path) == {"a": data}


def test_a_file_is_synced_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the bytes, then the name, then the directory: a power cut leaves the old file or the new one."""
    calls = []
    for name in ("pwrite", "fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    write_whole_file(tmp_path / "a", b"data")
    assert calls == ["pwrite", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_the_old_file_stays_where_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whatever fails on the way, the name keeps what it stood for, and no descriptor is left."""
    write_whole_file(tmp_path / "a", b"old")
    before = open_descriptors()

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(NoSpaceError, match="a: cannot write: No space left"):
            write_whole_file(tmp_path / "a", b"new and longer")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert open_descriptors() == before
    write_whole_file(tmp_path / "a", b"new")
    assert tree(tmp_path) == {"a": b"new"}


def test_all_is_written_however_little_the_system_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short writes go on where they stopped, on systems with pwrite and without."""
    data = bytes(range(256)) * 5
    for name in ("with", "without"):
        with monkeypatch.context() as patch:
            pwrite, write = os.pwrite, os.write
            if name == "with":
                patch.setattr(os, "pwrite", lambda fd, data, offset, real=pwrite: real(fd, data[:7], offset))
            else:
                patch.delattr(os, "pwrite")
                patch.setattr(os, "write", lambda fd, data, real=write: real(fd, data[:7]))
            fd = os.open(tmp_path / name, os.O_WRONLY | os.O_CREAT)
            write_all(fd, memoryview(data), 3)
            os.close(fd)
        assert (tmp_path / name).read_bytes() == bytes(3) + data


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EACCES, OutputError),
        (errno.EROFS, OutputError),
    ],
)
def test_output_errors(code: int, kind: type[OutputError]) -> None:
    """Full disks and quotas are one branch, everything else the other; the path is named, the cause kept."""
    with pytest.raises(OutputError, match="/some/path: cannot write") as raised, output_errors(Path("/some/path")):
        raise OSError(code, os.strerror(code))
    assert type(raised.value) is kind
    assert isinstance(raised.value.__cause__, OSError)
    with pytest.raises(ValueError, match="not of the system"), output_errors(Path("x")):
        raise ValueError("not of the system")


def test_a_directory_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not know how is no error; one that fails is."""
    for code in (errno.EINVAL, errno.EIO):

        def fsync(fd: int, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)
        if code == errno.EINVAL:
            sync_directory(tmp_path)
        else:
            with pytest.raises(OutputError):
                sync_directory(tmp_path)
