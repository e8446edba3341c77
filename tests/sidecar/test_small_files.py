"""Small files are copied with their digests, and never over something else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from checkpoints import tree

from mmsplit.errors import CheckpointError, IntegrityError, OutputExistsError
from mmsplit.sidecar.set_manifest import FileEntry
from mmsplit.sidecar.small_files import copy_small_files


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files, one of them in a folder."""
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "source" / "a.txt").write_bytes(b"a")
    (tmp_path / "source" / "sub" / "b.txt").write_bytes(b"")
    return tmp_path / "source"


_NAMES = ("a.txt", "sub/b.txt")


def test_copied_twice_is_copied_once(source: Path, tmp_path: Path) -> None:
    """The second time nothing is touched, and the entries are the same."""
    out = tmp_path / "out"
    out.mkdir()
    entries = copy_small_files(source, _NAMES, out)
    assert entries == (FileEntry("a.txt", 1, _sha256(b"a")), FileEntry("sub/b.txt", 0, _sha256(b"")))
    assert tree(out) == tree(source)
    times = [(out / name).stat().st_mtime_ns for name in _NAMES]
    assert copy_small_files(source, _NAMES, out) == entries
    assert [(out / name).stat().st_mtime_ns for name in _NAMES] == times


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_something_else_in_the_way(source: Path, tmp_path: Path, kind: str) -> None:
    """It stays, and nothing is copied, not even what comes before it."""
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    place = out / "sub" / "b.txt"
    if kind == "file":
        place.write_bytes(b"mine")
    elif kind == "directory":
        place.mkdir()
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match="another file of this name"):
        copy_small_files(source, _NAMES, out)
    assert not (out / "a.txt").exists()
    assert not (tmp_path / "nowhere").exists()


def test_what_may_be_replaced_is_replaced(source: Path, tmp_path: Path) -> None:
    """By digest: the very file that was recorded, and no other."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_bytes(b"old")
    with pytest.raises(OutputExistsError):
        copy_small_files(source, _NAMES, out, replaceable={"a.txt": _sha256(b"other")})
    copy_small_files(source, _NAMES, out, replaceable={"a.txt": _sha256(b"old")})
    assert tree(out) == tree(source)


def test_a_file_that_is_not_as_expected(source: Path, tmp_path: Path) -> None:
    """Held to digests, another content or a missing file is damage; otherwise a missing file is the source's fault."""
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(IntegrityError, match="not as it was written"):
        copy_small_files(source, ["a.txt"], out, expected={"a.txt": _sha256(b"b")})
    (source / "a.txt").unlink()
    with pytest.raises(IntegrityError, match="cannot read"):
        copy_small_files(source, ["a.txt"], out, expected={"a.txt": _sha256(b"a")})
    with pytest.raises(CheckpointError, match="cannot read"):
        copy_small_files(source, ["a.txt"], out)
    assert tree(out) == {}
