"""The output directory: one writer at a time, and a clear word on what is there already."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
from checkpoints import open_descriptors

from mmsplit.errors import NoSpaceError, OutputError, OutputExistsError, OutputLockedError
from mmsplit.sidecar.output_directory import LOCK_NAME, STATE_NAME, OutputDirectory, free_bytes
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME

_IDENTITY = {"source": "s", "plan": "p", "codec": "planes"}


def test_the_lock_is_held_and_goes_away(tmp_path: Path) -> None:
    """A second one is refused while the first is inside; afterwards nothing is left of it."""
    before = open_descriptors()
    with OutputDirectory(tmp_path / "a" / "b") as out:
        with pytest.raises(OutputLockedError), OutputDirectory(out.path):
            pass
        assert (out.path / LOCK_NAME).exists()
    with OutputDirectory(tmp_path / "a" / "b"):
        pass
    assert list((tmp_path / "a" / "b").iterdir()) == []
    assert open_descriptors() == before


def test_a_run_that_is_refused_leaves_no_empty_directory(tmp_path: Path) -> None:
    """It removes what it made, as far as that is empty; what was there, or holds anything, stays."""

    def refused(path: Path, name: str | None = None) -> None:
        with suppress(NoSpaceError), OutputDirectory(path) as out:
            if name is not None:
                (out.path / name).touch()
            out.require_space(1 << 62, "all of it")
            pytest.fail("nobody has so much space")

    refused(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    refused(tmp_path)
    (tmp_path / "a").mkdir()
    refused(tmp_path / "a" / "b")
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    refused(tmp_path / "a" / "b", "half")
    assert (tmp_path / "a" / "b" / "half").exists()


def test_a_directory_that_is_removed_under_us_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was refused may remove it between our look and our lock, before the file is opened or after."""
    real, calls = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        if not calls:
            (tmp_path / "a" / LOCK_NAME).unlink()
            (tmp_path / "a").rmdir()
        calls.append(fd)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with OutputDirectory(tmp_path / "a"):
        assert (tmp_path / "a" / LOCK_NAME).exists()
        with pytest.raises(OutputLockedError), OutputDirectory(tmp_path / "a"):
            pass
    assert (tmp_path / "a").is_dir()


def test_a_lock_file_without_an_owner_is_no_lock(tmp_path: Path) -> None:
    """What a killed run leaves does not keep others out."""
    (tmp_path / LOCK_NAME).write_bytes(b"")
    with OutputDirectory(tmp_path) as out:
        assert out.prepare(_IDENTITY, "refuse") == "nothing"


def test_the_lock_file_that_is_removed_under_us_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking the owner may have removed the file: a lock on what has no name is no lock."""
    real, calls = fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        if not calls:
            (tmp_path / LOCK_NAME).unlink()
        calls.append(fd)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with OutputDirectory(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / LOCK_NAME).exists()
        with pytest.raises(OutputLockedError), OutputDirectory(tmp_path):
            pass


def test_a_file_system_without_locks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody can lock, nobody writes unlocked; and no descriptor is left."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = open_descriptors()
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match="cannot lock the output"), OutputDirectory(tmp_path):
        pass
    assert open_descriptors() == before


def test_the_state_tells_what_is_unfinished(tmp_path: Path) -> None:
    """Written and read back, it is what the next run compares itself with."""
    with OutputDirectory(tmp_path) as out:
        assert out.read_state() == {}
        out.write_state({**_IDENTITY, "more": [1]})
        assert out.read_state()["more"] == [1]
        assert out.prepare(_IDENTITY, "resume") == "unfinished"
        with pytest.raises(OutputExistsError, match="unfinished split of another plan, codec"):
            out.prepare({**_IDENTITY, "plan": "q", "codec": "raw"}, "resume")
        with pytest.raises(OutputExistsError, match="--resume to go on"):
            out.prepare(_IDENTITY, "refuse")
        assert out.prepare(_IDENTITY, "force") == "nothing"
        assert out.read_state()["source"] == _IDENTITY["source"]  # until it is clear that the run can be made
        out.remove_own_files()
        assert "source" not in out.read_state()  # all it still says is which small files are ours


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"null", b"{", b"\xff", b"[" * 99999, b'{"source": "s"}'])
def test_a_state_that_is_not_whole_is_refused(tmp_path: Path, text: bytes) -> None:
    """Nothing of it is believed."""
    (tmp_path / STATE_NAME).write_bytes(text)
    with OutputDirectory(tmp_path) as out, pytest.raises(OutputExistsError, match="cannot read the state"):
        out.prepare(_IDENTITY, "resume")


def test_half_a_first_state_is_in_nobodys_way(tmp_path: Path) -> None:
    """A run that was killed while it wrote its first state left nothing else."""
    (tmp_path / f"{STATE_NAME}.partial").write_bytes(b"{")
    with OutputDirectory(tmp_path) as out:
        for existing in ("refuse", "resume"):
            assert out.prepare(_IDENTITY, existing) == "nothing"
        out.write_state(_IDENTITY)
        out.finish(json.dumps({}).encode())
    assert {path.name for path in tmp_path.iterdir()} == {SET_MANIFEST_NAME}


def test_a_set_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    """It is neither continued nor replaced without a word."""
    (tmp_path / SET_MANIFEST_NAME).write_text('{"format": "mmsplit-set"}')
    with OutputDirectory(tmp_path) as out:
        for existing in ("refuse", "resume"):
            with pytest.raises(OutputExistsError, match="set manifest that cannot be read"):
                out.prepare(_IDENTITY, existing)
        assert out.prepare(_IDENTITY, "force") == "nothing"


def test_links_with_our_names_are_not_ours(tmp_path: Path) -> None:
    """Force removes files, not links to files elsewhere, and does not follow them."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"MMSPLIT\0")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "partition_0.bin").symlink_to(elsewhere)
    with OutputDirectory(tmp_path / "out") as out, pytest.raises(OutputExistsError, match="did not write it"):
        out.prepare(_IDENTITY, "force")
    assert elsewhere.exists()


def test_space_is_counted_for_this_user(tmp_path: Path) -> None:
    """Enough passes, too much says how much is missing."""
    free = free_bytes(tmp_path)
    with OutputDirectory(tmp_path) as out:
        out.require_space(free // 2, "it")
        with pytest.raises(NoSpaceError, match=r"too little free space for it \(expected [\d,]+ bytes free"):
            out.require_space(2**62, "it")


def test_a_users_file_with_the_name_of_work_in_progress_is_not_ours(tmp_path: Path) -> None:
    """A payload under construction begins with its header or is empty; anything else is somebody's."""
    mine = tmp_path / "partition_9.bin.partial"
    mine.write_bytes(b"a download of mine")
    with OutputDirectory(tmp_path) as out:
        with pytest.raises(OutputExistsError, match="mmsplit did not write it"):
            out.prepare(_IDENTITY, "force")
        assert mine.read_bytes() == b"a download of mine"
        mine.write_bytes(b"")
        assert out.prepare(_IDENTITY, "force") == "nothing"


def test_a_payload_whose_header_did_not_reach_the_disk_is_ours(tmp_path: Path) -> None:
    """After a loss of power there are zeros where the header would be; --force must be able to replace that."""
    hole = tmp_path / "partition_9.bin.partial"
    hole.write_bytes(bytes(4096) + b"a slot")
    with OutputDirectory(tmp_path) as out:
        assert out.prepare(_IDENTITY, "force") == "nothing"
        out.remove_own_files()
    assert not hole.exists()


def test_a_directory_that_cannot_be_listed_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files, say; with force as without."""

    def refuse(_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with OutputDirectory(tmp_path) as out:
        monkeypatch.setattr(os, "listdir", refuse)
        for existing in ("refuse", "force"):
            with pytest.raises(OutputError, match="Too many open files"):
                out.prepare(_IDENTITY, existing)
