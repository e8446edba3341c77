"""Opening one partition, and finding the set that it is of."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_weights, open_descriptors, write_checkpoint

from mmsplit.errors import CheckpointError, FormatError, IntegrityError, MissingPartitionError, MmsplitError
from mmsplit.sidecar.partition_reader import (
    Fault,
    open_partition_files,
    read_manifest_copy,
    read_partition_files,
    require_partition,
)
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME
from mmsplit.sidecar.set_reader import missing_partitions, open_partition_of_set, read_set_manifest, resolve_set_path
from mmsplit.verbs.split import split


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A sound set in two partitions."""
    split(write_checkpoint(tmp_path / "model", [llama_weights(2)]), tmp_path / "set", 2)
    return tmp_path / "set"


@pytest.mark.parametrize("suffix", [".json", ".bin"])
@pytest.mark.parametrize("io", ["auto", "mmap", "pread"])
def test_a_partition_is_opened_by_either_file(made: Path, suffix: str, io: Any) -> None:
    """Manifest, index and payload belong together, and closing leaves nothing open."""
    before = open_descriptors()
    with open_partition_files(made / f"partition_1{suffix}", io) as partition:
        assert partition.manifest.part_id == 1
        assert len(partition.index) == partition.manifest.chunk_count
        start, stop, encoded = partition.encoded(0)
        assert stop - start == encoded.stored_bytes
    assert open_descriptors() == before


def test_the_payload_has_the_manifest_in_it(made: Path) -> None:
    """A lost JSON can be written anew, byte for byte; until then the partition is read with a fault on record."""
    json_path = made / "partition_0.json"
    text = json_path.read_bytes()
    assert read_manifest_copy(made / "partition_0.bin") == text
    json_path.unlink()
    faults: list[Fault] = []
    partition = read_partition_files(json_path, faults.append)
    assert partition is not None
    partition.close()
    assert [fault.what for fault in faults] == ["manifest is missing"]
    with pytest.raises(IntegrityError, match=r"partition_0\.json: manifest is missing.*mmsplit verify"):
        open_partition_files(json_path)


def test_a_failed_opening_leaves_no_descriptor(made: Path) -> None:
    """Whatever is wrong, the payload is closed again."""
    payload = made / "partition_0.bin"
    data = payload.read_bytes()
    before = open_descriptors()
    for damaged in (b"", data[:100], b"x" * 5000, data[:-1], data[:5000] + b"!" + data[5001:-200] + bytes(200)):
        payload.write_bytes(damaged)
        with pytest.raises(MmsplitError):
            open_partition_files(made / "partition_0.json")
        with pytest.raises(MmsplitError):
            read_manifest_copy(payload)
        assert open_descriptors() == before


@pytest.mark.parametrize("name", ["partition_0.json", "partition_0.bin", SET_MANIFEST_NAME])
def test_a_file_that_cannot_be_opened_is_our_error(made: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A refusal of the system does not come through as its own exception."""
    real = os.open

    def refuse_open(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse_open)
    with pytest.raises(MmsplitError, match="cannot be read: Permission denied"):
        open_partition_of_set(made, read_set_manifest(made), 0, "auto")


def test_a_disk_that_fails_under_the_payload(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input/output error while the structure is read is an error of ours with path and offset."""

    def fail(*args: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"partition_0\.bin, byte 0: cannot read: Input/output error"):
        open_partition_files(made / "partition_0.json", "pread")


def test_what_a_path_stands_for(made: Path) -> None:
    """A directory and its set manifest are the set; one file of a partition is that partition."""
    assert resolve_set_path(made) == resolve_set_path(made / SET_MANIFEST_NAME) == (made, None)
    for name in ("partition_1.json", "partition_1.bin"):
        assert resolve_set_path(made / name) == (made, made / "partition_1.json")
    (made / "readme.md").write_text("")
    for name in ("readme.md", "nothing"):
        with pytest.raises(FormatError):
            resolve_set_path(made / name)


def test_partitions_that_are_missing(made: Path) -> None:
    """Without either of its files a partition is not there."""
    manifest = read_set_manifest(made)
    assert missing_partitions(made, manifest) == ()
    (made / "partition_0.json").unlink()
    (made / "partition_1.bin").unlink()
    assert missing_partitions(made, manifest) == (0, 1)
    for part_id in (0, 1):
        with pytest.raises(MissingPartitionError, match=f"partition {part_id} is not here"):
            require_partition(made, part_id)


def test_a_set_holds_its_partitions(made: Path, tmp_path: Path) -> None:
    """A partition of another set of the same model is sound in itself, and refused; nothing stays open."""
    split(tmp_path / "model", tmp_path / "other", 2, codec="raw")
    before = open_descriptors()
    for name in ("partition_0.json", "partition_0.bin"):
        shutil.copyfile(tmp_path / "other" / name, made / name)
    open_partition_files(made / "partition_0.json").close()
    with pytest.raises(IntegrityError, match="not the one the set was made with"):
        open_partition_of_set(made, read_set_manifest(made), 0, "auto")
    open_partition_of_set(made, read_set_manifest(made), 1, "auto").close()
    assert open_descriptors() == before


def test_a_set_manifest_that_is_too_large(made: Path) -> None:
    """It is refused by its size, before it is read."""
    with (made / SET_MANIFEST_NAME).open("r+b") as file:
        file.truncate((1 << 30) + 1)  # sparse: takes no room
    with pytest.raises(IntegrityError, match="too large"):
        read_set_manifest(made)
