"""The portable path: no positional reads, no advice to the kernel, no O_DIRECT, no populate."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import mmsplit
from mmsplit.checkpoint import FileReader, file_reader
from mmsplit.sidecar.payload_file import PayloadFile

#: What Windows lacks of `os`; macOS lacks some of it.
MISSING = (
    "preadv",
    "pread",
    "pwrite",
    "posix_fadvise",
    "POSIX_FADV_WILLNEED",
    "POSIX_FADV_DONTNEED",
    "O_DIRECT",
    "O_CLOEXEC",
    "sched_getaffinity",
)


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that is not Linux, as far as it can be had here."""
    for name in MISSING:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    file_reader.can_populate.cache_clear()
    yield
    monkeypatch.undo()
    file_reader.can_populate.cache_clear()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards with an index's worth of tensors, one of them of three chunks."""
    directory = tmp_path / "model"
    directory.mkdir()
    rng = np.random.default_rng(0)
    first = {"model.layers.0.w.weight": rng.standard_normal(2_200_000, np.float32), "model.norm.weight": np.ones(7)}
    second = {"model.layers.1.w.weight": rng.standard_normal(9_999).astype(np.float16)}
    save_file(first, directory / "model-00001-of-00002.safetensors")
    save_file(second, directory / "model-00002-of-00002.safetensors")
    return directory


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_everything_works_and_gives_the_same_bytes(
    checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Split, resume, verify, load and merge on the portable path: the set is the one Linux makes."""
    mmsplit.split(checkpoint, tmp_path / "linux", 2)
    request.getfixturevalue("portable")
    result = mmsplit.split(checkpoint, tmp_path / "portable", 2, threads=2)
    assert _files(tmp_path / "portable") == _files(tmp_path / "linux")
    assert mmsplit.split(checkpoint, tmp_path / "portable", 2, existing="resume").already_finished
    assert mmsplit.verify(tmp_path / "portable", level="full", against=checkpoint).ok
    mmsplit.merge(tmp_path / "portable", tmp_path / "merged")
    assert _files(tmp_path / "merged") == _files(checkpoint)
    mmsplit.export(tmp_path / "portable", tmp_path / "exported", max_shard_bytes=9_000_000)
    assert set(mmsplit.open_checkpoint(tmp_path / "exported").tensors) == set(
        mmsplit.open_checkpoint(checkpoint).tensors
    )
    with mmsplit.open_set(tmp_path / "portable") as loaded:
        assert loaded["model.norm.weight"].tolist() == [1.0] * 7
    assert result.root_digest


def test_a_resumed_run_comes_to_the_same_bytes(checkpoint: Path, tmp_path: Path, portable: None) -> None:
    """An interrupt on the portable path costs nothing but time."""
    mmsplit.split(checkpoint, tmp_path / "whole", 1)

    def stop(progress: mmsplit.Progress) -> None:
        if progress.done_bytes > 5_000_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mmsplit.split(checkpoint, tmp_path / "resumed", 1, threads=1, progress=stop)
    mmsplit.split(checkpoint, tmp_path / "resumed", 1, existing="resume")
    assert _files(tmp_path / "resumed") == _files(tmp_path / "whole")


def test_nothing_is_mapped_and_nothing_bypasses_the_cache(checkpoint: Path, tmp_path: Path, portable: None) -> None:
    """The fixture does take the Linux paths away."""
    with FileReader(checkpoint / "model-00001-of-00002.safetensors", io="mmap") as reader:
        assert not reader.is_mapped
    file = PayloadFile(tmp_path / "payload")
    assert not file.is_direct
    file.close()


def test_truncation_while_reading_is_an_error(checkpoint: Path, portable: None) -> None:
    """A short read is SourceChangedError with path and offset."""
    path = checkpoint / "model-00001-of-00002.safetensors"
    with FileReader(path) as reader:
        os.truncate(path, 1000)
        with pytest.raises(mmsplit.SourceChangedError, match="truncated") as caught:
            reader.read(0, 5000)
    assert caught.value.offset == 1000
