"""Small files are copied with their digests, and never over something else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from checkpoints import tree

from mmsplit.checkpoint import LocalStorage
from mmsplit.errors import CheckpointError, IntegrityError, OutputExistsError
from mmsplit.sidecar.set_manifest import FileEntry
from mmsplit.sidecar.small_files import copy_small_files, read_small_files, require_free_names


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


def copy(source: Path, out: Path, ours: dict[str, list[str]] | None = None) -> tuple[FileEntry, ...]:
    """What split (with `ours`) and merge (without) do."""
    entries = read_small_files(LocalStorage(source), _NAMES)
    require_free_names(out, entries, ours)
    copy_small_files(LocalStorage(source), entries, out)
    return entries


def test_copied_twice_is_copied_once(source: Path, tmp_path: Path) -> None:
    """The second time nothing is touched, and the entries are the same."""
    out = tmp_path / "out"
    out.mkdir()
    entries = copy(source, out, {})
    assert entries == (FileEntry("a.txt", 1, _sha256(b"a")), FileEntry("sub/b.txt", 0, _sha256(b"")))
    assert tree(out) == tree(source)
    times = [(out / name).stat().st_mtime_ns for name in _NAMES]
    assert copy(source, out, {entry.name: [entry.sha256] for entry in entries}) == entries
    assert copy(source, out) == entries
    assert [(out / name).stat().st_mtime_ns for name in _NAMES] == times


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
@pytest.mark.parametrize("ours", [None, {}])
def test_something_else_in_the_way(source: Path, tmp_path: Path, kind: str, ours: dict[str, list[str]] | None) -> None:
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
    with pytest.raises(OutputExistsError, match="mmsplit did not write"):
        copy(source, out, ours)
    assert not (out / "a.txt").exists()
    assert not (tmp_path / "nowhere").exists()


def test_a_file_of_the_same_content_is_still_not_ours(source: Path, tmp_path: Path) -> None:
    """Taking it for ours would let a later --force replace it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_bytes(b"a")
    with pytest.raises(OutputExistsError):
        copy(source, out, {})
    copy(source, out)  # merge never replaces, so there it will do
    assert tree(out) == tree(source)


def test_what_may_be_replaced_is_replaced(source: Path, tmp_path: Path) -> None:
    """By digest: a file that was recorded, and no other."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_bytes(b"old")
    with pytest.raises(OutputExistsError):
        copy(source, out, {"a.txt": [_sha256(b"other")]})
    copy(source, out, {"a.txt": [_sha256(b"new"), _sha256(b"old")]})
    assert tree(out) == tree(source)


def test_a_file_that_is_not_as_expected(source: Path) -> None:
    """Held to digests, another content or a missing file is damage; otherwise a missing file is the source's fault."""
    with pytest.raises(IntegrityError, match="not as it was written"):
        read_small_files(LocalStorage(source), ["a.txt"], {"a.txt": _sha256(b"b")})
    (source / "a.txt").unlink()
    with pytest.raises(IntegrityError, match="cannot read"):
        read_small_files(LocalStorage(source), ["a.txt"], {"a.txt": _sha256(b"a")})
    with pytest.raises(CheckpointError, match="cannot read"):
        read_small_files(LocalStorage(source), ["a.txt"])
