"""The machine refuses to write: an error that says what to do, nothing that passes for whole, and a way to go on."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, llama_weights, open_descriptors, tree, write_checkpoint

from mmsplit.errors import FormatError, NoSpaceError, OutputError, OutputExistsError
from mmsplit.sidecar import output_directory, output_files, payload_file, payload_writer
from mmsplit.splitting import space
from mmsplit.verbs.merge import merge
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 13 MB in two shards: slots of full size and small ones."""
    weights = llama_weights(2) + [Weight(f"model.layers.{k}.big", "BF16", (3 * MIB,), 90) for k in range(2)]
    files = {"config.json": CAUSAL_CONFIG}
    return write_checkpoint(
        tmp_path_factory.mktemp("m") / "model", [weights[::2], weights[1::2]], index=True, files=files
    )


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound set, never to be changed."""
    out = tmp_path_factory.mktemp("made") / "set"
    split(source, out, 2)
    return out


class _Disk:
    """A disk that takes `room` bytes and then fails with `code`."""

    def __init__(self, room: int, code: int) -> None:
        self._room = room
        self._code = code
        self._lock = threading.Lock()

    def write_all(self, fd: int, data: memoryview, offset: int) -> None:
        with self._lock:
            fits = min(len(data), self._room)
            self._room -= fits
        if fits < len(data):
            raise OSError(self._code, os.strerror(self._code))
        _real_write_all(fd, data, offset)


_real_write_all = output_files.write_all


def _install(monkeypatch: pytest.MonkeyPatch, disk: _Disk) -> None:
    for module in (output_files, payload_file, payload_writer):
        monkeypatch.setattr(module, "write_all", disk.write_all)


_FAILURES = [
    (errno.ENOSPC, NoSpaceError, "Free some space"),
    (errno.EDQUOT, NoSpaceError, "Free some space"),
    (errno.EIO, OutputError, "its disk is sound"),
    (errno.EACCES, OutputError, "is writable"),
]


@pytest.mark.parametrize("room", [0, 300, 5000, 2 * MIB, 6 * MIB, -500])
@pytest.mark.parametrize(("code", "kind", "hint"), _FAILURES)
def test_split_on_a_disk_that_fails(
    source: Path,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    code: int,
    kind: type,
    hint: str,
) -> None:
    """Wherever the disk fails, the error says so, no thread or file is left, and a later run completes the set."""
    if room < 0:  # counted from the end
        room += sum(len(data) for data in tree(made).values())
    before = threading.active_count(), open_descriptors()
    with monkeypatch.context() as patch:
        _install(patch, _Disk(room, code))
        with pytest.raises(kind, match=hint) as raised:
            split(source, tmp_path, 2, threads=2)
    assert type(raised.value) is kind
    assert str(tmp_path) in str(raised.value)
    assert (threading.active_count(), open_descriptors()) == before
    with pytest.raises(FormatError):
        verify(tmp_path)
    split(source, tmp_path, 2, existing="resume")
    assert tree(tmp_path) == tree(made)


@pytest.mark.parametrize("room", [0, 100, 3 * MIB, 12 * MIB])
@pytest.mark.parametrize(("code", "kind", "hint"), _FAILURES)
def test_merge_on_a_disk_that_fails(
    source: Path,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    code: int,
    kind: type,
    hint: str,
) -> None:
    """No shard has its name before it is whole, the index is not there, and a later run completes the checkpoint."""
    before = threading.active_count(), open_descriptors()
    with monkeypatch.context() as patch:
        _install(patch, _Disk(room, code))
        with pytest.raises(kind, match=hint):
            merge(made, tmp_path, threads=2)
    assert (threading.active_count(), open_descriptors()) == before
    original = tree(source)
    assert all(original[name] == data for name, data in tree(tmp_path).items() if name in original)
    assert not (tmp_path / INDEX).exists()
    merge(made, tmp_path, resume=True)
    assert tree(tmp_path) == original


@pytest.mark.parametrize("call", ["fsync", "ftruncate", "replace", "mkdir", "unlink"])
def test_split_where_another_call_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Not only writes fail: every refusal of the system becomes ours, and the run can be resumed."""

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        if call == "unlink":
            # The lock file may stay; the state may not.
            with pytest.raises(OutputError):
                split(source, out, 2)
        else:
            with pytest.raises(OutputError, match="cannot write"):
                split(source, out, 2)
    split(source, out, 2, existing="resume")
    assert verify(out, level="full").ok


def test_too_little_space_is_said_before_the_first_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written where not all can be, and the message says how much is missing."""
    for free in (0, 5 * MIB):
        monkeypatch.setattr(output_directory, "free_bytes", lambda _, free=free: free)
        monkeypatch.setattr(space, "free_bytes", lambda _, free=free: free)
        with pytest.raises(NoSpaceError, match=r"too little free space.*Free [\d,]+ bytes more"):
            split(source, tmp_path, 2)
        assert tree(tmp_path) == {}


def test_the_ratio_is_measured_where_the_worst_case_does_not_fit(
    source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that holds the encoded set but not the raw one is enough, and a sample leaves no trace in the result."""
    needed = sum(len(data) for data in tree(made).values())
    raw = sum(len(data) for data in tree(source).values())
    free = (needed + raw) // 2
    monkeypatch.setattr(output_directory, "free_bytes", lambda _: free)
    monkeypatch.setattr(space, "free_bytes", lambda _: free)
    split(source, tmp_path, 2)
    assert tree(tmp_path) == tree(made)


def test_too_little_space_for_merge(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the merged checkpoint."""
    monkeypatch.setattr(output_directory, "free_bytes", lambda _: 10 * MIB)
    with pytest.raises(NoSpaceError, match="too little free space for the merged checkpoint"):
        merge(made, tmp_path)
    assert tree(tmp_path) == {}


def _refuse(verb: str, source: Path, made: Path, out: Path) -> Callable[[], object]:
    return (lambda: split(source, out, 2)) if verb == "split" else (lambda: merge(made, out))


@pytest.mark.parametrize("verb", ["split", "merge"])
def test_an_output_that_is_a_file(source: Path, made: Path, tmp_path: Path, verb: str) -> None:
    """A file in the place of the directory is left alone."""
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="not a directory"):
        _refuse(verb, source, made, out)()
    with pytest.raises(OutputError):
        _refuse(verb, source, made, out / "deeper")()
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize("verb", ["split", "merge"])
def test_an_output_that_is_read_only(source: Path, made: Path, tmp_path: Path, verb: str) -> None:
    """A directory without permission is an output error that names it."""
    tmp_path.chmod(0o555)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write anywhere")
        with pytest.raises(OutputError, match="cannot write: Permission denied"):
            _refuse(verb, source, made, tmp_path)()
    finally:
        tmp_path.chmod(0o755)
