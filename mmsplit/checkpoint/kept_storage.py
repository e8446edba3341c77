"""A checkpoint of which some shards were deleted, and of those their kept bytes remain: enough to plan it again.

What was deleted is served from memory: its header, with zeros where its tensors were.  Nobody who has the plan reads
a tensor there, since it is in a partition; the others, who borrow ranges, are told that the shard is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from mmsplit.checkpoint.checkpoint import Checkpoint, read_checkpoint
from mmsplit.checkpoint.directory import CheckpointFiles
from mmsplit.checkpoint.file_reader import IoMode, Scratch
from mmsplit.checkpoint.local_storage import LocalStorage
from mmsplit.checkpoint.reader_pool import ReaderPool
from mmsplit.checkpoint.storage import Identity, RangeReader
from mmsplit.checkpoint.tensor import ByteRange
from mmsplit.errors import MissingShardError


class KeptShard(NamedTuple):
    """What is recorded of a shard: `data` are the bytes of the ranges `kept`, joined."""

    name: str
    size_bytes: int
    identity: Identity
    kept: tuple[ByteRange, ...]
    data: bytes


class KeptSource(NamedTuple):
    """What is recorded of a checkpoint, so that it can be planned again when shards are gone.

    `same_as` has, by name, the tensor whose bytes another one repeats: to find out, the bytes would be needed.
    """

    shards: tuple[KeptShard, ...]
    weights_index: tuple[str, bytes] | None
    small_files: tuple[str, ...]
    same_as: Mapping[str, str]


def open_kept_checkpoint(path: Path, kept: KeptSource, *, allow_unknown_dtypes: bool = False) -> Checkpoint:
    """Read the headers of a recorded checkpoint: of shards that are there from their files, of the others as recorded.

    `path` is what was split: a directory, a shard or a weights index, which may be gone.  Raises as `open_checkpoint`.
    """
    directory = path if path.is_dir() else path.parent
    gone = {shard.name: shard for shard in kept.shards if not (directory / shard.name).exists()}
    storage = KeptStorage(directory, gone)
    index_name, index = kept.weights_index or (None, b"")
    # What is recorded may be somebody's lie: only what is found there, below the directory, is carried along.
    found = {name for name, size in storage.walk(True, []) if size is not None}
    small = tuple(name for name in kept.small_files if name in found)
    names = tuple(shard.name for shard in kept.shards)
    files = CheckpointFiles(storage, names, index_name, index, None, small, ())
    return read_checkpoint(files, allow_unknown_dtypes=allow_unknown_dtypes)


class KeptStorage:
    """The files of a directory, and shards that are not there any more; see `Storage`."""

    def __init__(self, directory: Path, gone: Mapping[str, KeptShard]) -> None:
        self._files = LocalStorage(directory)
        self._gone = gone
        self.directory = directory
        self.moved_bytes = None

    @property
    def location(self) -> str:
        """The directory."""
        return self._files.location

    @property
    def model(self) -> tuple[str, str | None]:
        """As for any directory."""
        return self._files.model

    def location_of(self, name: str) -> str:
        """Path of a file."""
        return self._files.location_of(name)

    def names(self) -> list[str]:
        """Names of the files right inside, and of the shards that were."""
        return sorted({*self._files.names(), *self._gone})

    def walk(self, deep: bool, notes: list[str]) -> Iterator[tuple[str, int | None]]:
        """Yield the files that are there."""
        return self._files.walk(deep, notes)

    def file_bytes(self, name: str) -> int | None:
        """Length of a file; of a shard that is gone, its length when it was there."""
        return self._gone[name].size_bytes if name in self._gone else self._files.file_bytes(name)

    def read_file(self, name: str) -> bytes:
        """Read a small file."""
        return self._files.read_file(name)

    def identity_of(self, name: str) -> Identity:
        """As recorded, for a shard that is gone."""
        return self._gone[name].identity if name in self._gone else self._files.identity_of(name)

    def require_unchanged(self, identities: Mapping[str, Identity]) -> None:
        """Look at each shard that is there once more."""
        self._files.require_unchanged({name: value for name, value in identities.items() if name not in self._gone})

    def open_shard(self, name: str, io: IoMode, identity: Identity | None = None) -> RangeReader:
        """Open a shard, or what was kept of it."""
        if name in self._gone:
            return _KeptReader(self._gone[name], self.location_of(name))
        return self._files.open_shard(name, io, identity)

    def open_readers(self, io: IoMode, identities: Mapping[str, Identity]) -> ReaderPool:
        """Return readers of those shards that are there."""
        return self._files.open_readers(io, identities)

    def published_sha256(self, name: str) -> str | None:
        """As for any directory."""
        return self._files.published_sha256(name)


class _KeptReader:
    """The kept bytes of a shard in their places; zeros elsewhere, which readers of headers throw away."""

    def __init__(self, shard: KeptShard, location: str) -> None:
        self._shard = shard
        self._location = location

    @property
    def size_bytes(self) -> int:
        return self._shard.size_bytes

    def borrow(self, start: int, stop: int, scratch: Scratch) -> AbstractContextManager[memoryview]:  # noqa: ARG002
        raise MissingShardError("shard was deleted: its tensors are in partitions", path=self._location, offset=start)

    def read(self, start: int, stop: int) -> bytes:
        data = bytearray(stop - start)
        position = 0
        for first, last in self._shard.kept:
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                piece = self._shard.data[position + begin - first : position + end - first]
                data[begin - start : end - start] = piece
            position += last - first
        return bytes(data)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.read(start, stop) for start, stop in ranges]

    def close(self) -> None:
        """Nothing is open."""
