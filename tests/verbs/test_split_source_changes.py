"""The source changes while it is split: an error that says so, never a crash by signal, never a set of two halves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import MIB, Weight, write_checkpoint
from children import at_bytes, in_child

from mmsplit.checkpoint import IoMode, open_checkpoint
from mmsplit.errors import SourceChangedError
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.verbs.split import split
from mmsplit.workers import Progress

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="watches forked children")


def _truncate(path: Path) -> None:
    os.truncate(path, 10 * MIB)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"x" * 500)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _replace(path: Path) -> None:
    """Put another file of the same size and time in its place, as a re-download does."""
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


def _remove(path: Path) -> None:
    path.unlink()


_CHANGES = {"truncated": _truncate, "overwritten": _overwrite, "appended to": _append, "replaced": _replace,
            "removed": _remove}  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve slots in one shard: enough that the change comes while most of them are still to be read."""
    weights = [Weight(f"model.layers.{k}.mlp.up_proj.weight", "F16", (2, MIB), 90) for k in range(12)]
    return write_checkpoint(tmp_path / "model", [weights])


class _InBackground:
    """A progress callback that begins a change when 8 MiB are done, and lets the run go on while it is under way.

    A change of a mapped file is held up by the kernel until the reader gives back its lease, so to wait for its end
    right here could be to wait for oneself.
    """

    def __init__(self, change: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=change, daemon=True)
        self._started = False

    def __call__(self, progress: Progress) -> None:
        if progress.stage == "split" and progress.done_bytes >= 8 * MIB:
            if not self._started:
                self._started = True
                self._thread.start()
            self._thread.join(0.2)


@pytest.mark.parametrize("io", ["auto", "mmap", "pread"])
@pytest.mark.parametrize("change", _CHANGES)
def test_a_change_while_splitting_is_an_error(source: Path, tmp_path: Path, change: str, io: IoMode) -> None:
    """However the shard is read and whatever is done to it, the child ends with our error and there is no set."""
    shard = source / "model.safetensors"
    callback = _InBackground(lambda: _CHANGES[change](shard))
    ending = in_child(lambda: split(source, tmp_path / "set", 2, io=io, threads=2, progress=callback))
    assert ending.signal == 0
    # A file that is gone by name is read to its end by handle; opening it again is what fails.
    assert ending.error == ("CheckpointError" if change == "removed" else SourceChangedError.__name__), ending.message
    assert str(shard) in ending.message
    assert not (tmp_path / "set" / SET_MANIFEST_NAME).exists()


def test_a_change_after_the_headers_were_read(source: Path, tmp_path: Path) -> None:
    """An open checkpoint is of one state of its files; splitting another one is refused before anything is written."""
    checkpoint = open_checkpoint(source)
    _append(source / "model.safetensors")
    with pytest.raises(SourceChangedError, match="changed while it was read"):
        split(checkpoint, tmp_path / "set", 2)
    assert not (tmp_path / "set").exists()


def test_a_change_in_the_last_moment(source: Path, tmp_path: Path) -> None:
    """When every byte has been read once more the shards are looked at."""
    shard = source / "model.safetensors"
    callback = at_bytes("split", 48 * MIB, lambda: os.utime(shard, ns=(1, 1)))
    with pytest.raises(
        SourceChangedError, match=r"changed while it was read \(expected .* bytes, last written .*, found"
    ):
        split(source, tmp_path / "set", 2, progress=callback)
    assert not (tmp_path / "set" / SET_MANIFEST_NAME).exists()
