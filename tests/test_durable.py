"""What is made survives a loss of power: directories, with the names that lead to them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmsplit.durable import make_directory


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories that were synced, in order."""
    paths: dict[int, Path] = {}
    found: list[Path] = []
    real_open = os.open

    def recording_open(path: Path, flags: int) -> int:
        fd = real_open(path, flags)
        paths[fd] = Path(path)
        return fd

    monkeypatch.setattr(os, "open", recording_open)
    monkeypatch.setattr(os, "fsync", lambda fd: found.append(paths[fd]))
    return found


@pytest.mark.skipif(os.name == "nt", reason="directories cannot be synced there")
def test_every_new_name_on_the_way_is_synced(tmp_path: Path, synced: list[Path]) -> None:
    """A directory's name lies in the one above it: syncing only the new one would leave it without a name."""
    make_directory(tmp_path / "a" / "b" / "c")
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}


@pytest.mark.skipif(os.name == "nt", reason="directories cannot be synced there")
def test_a_directory_that_is_there_is_synced_all_the_same(tmp_path: Path, synced: list[Path]) -> None:
    """It may be of a run that was killed between making and syncing it."""
    make_directory(tmp_path)
    assert synced == [tmp_path.parent]


def test_where_the_directory_above_cannot_be_read_it_is_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that may be written to and not read cannot be opened: that is no reason not to write."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    make_directory(tmp_path / "a")
    assert (tmp_path / "a").is_dir()


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    """As with `mkdir`."""
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FileExistsError):
        make_directory(tmp_path / "a")
    with pytest.raises(NotADirectoryError):
        make_directory(tmp_path / "a" / "b")
