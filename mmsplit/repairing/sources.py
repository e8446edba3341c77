"""Where damaged things are made again from: another copy of the set, or the checkpoint that was split.

Neither is believed.  What comes from them is compared with what the set has on record before it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import xxhash

from mmsplit.checkpoint import Checkpoint, RangeReader, Scratch
from mmsplit.codec import PLANES, RAW, ZSTD, ChunkEncoder, CodecName
from mmsplit.errors import (
    CheckpointError,
    IntegrityError,
    NetworkError,
    OfflineError,
    RemoteNotFoundError,
    RequestError,
)
from mmsplit.remote.remote_file import GoOn, RemoteFile
from mmsplit.remote.repository import hub_endpoint
from mmsplit.remote.set_source import SetSource, open_set_source, parse_hub_folder
from mmsplit.remote.source import HubOptions, hub_address_of, open_source
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.partition_reader import OpenPartition
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME

#: What is recorded for a chunk says by which encoder it was made.
_ENCODERS: Final[dict[int, CodecName]] = {RAW: "raw", ZSTD: "zstd", PLANES: "planes"}


class Encoding:
    """Encoders and buffers of one thread."""

    def __init__(self) -> None:
        self.scratch = Scratch()
        self._room = memoryview(bytearray(CHUNK_BYTES))
        self._encoders: dict[int, ChunkEncoder] = {}

    def encode(self, raw: memoryview, dtype: str, codec: int) -> memoryview:
        """Encode a chunk by the encoder that gives `codec`; the result is valid until the next call."""
        encoder = self._encoders.get(codec)
        if encoder is None:
            encoder = self._encoders[codec] = ChunkEncoder(_ENCODERS[codec], CHUNK_BYTES)
        return self._room[: encoder.encode(raw, dtype, self._room).stored_bytes]


class ChunkSource(Protocol):
    """Something that may have the stored bytes of a chunk."""

    @property
    def location(self) -> str:
        """What messages call it."""

    @property
    def is_remote(self) -> bool:
        """Whether bytes come over a network, so that asking again may bring others."""

    def may_have(self, partition: OpenPartition, chunk: int) -> bool:
        """Whether it is worth asking."""

    def stored_chunk(self, partition: OpenPartition, chunk: int, encoding: Encoding, go_on: GoOn) -> memoryview:
        """Return what it takes for the chunk as it was stored; who asks compares it.

        Raises `IntegrityError`, `CheckpointError` or `NetworkError`.
        """


class SetCopy:
    """Another copy of the set, or of some of its files: a directory, a folder on the Hub or on a server."""

    def __init__(self, place: SetSource) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._files: dict[str, RemoteFile] = {}
        self._read_bytes = 0

    @property
    def location(self) -> str:
        """Where it lies, without any secret."""
        return self._place.location

    @property
    def directory(self) -> Path | None:
        """Where it lies if it lies on this machine."""
        return self._place.directory

    @property
    def is_remote(self) -> bool:
        """Whether it lies elsewhere."""
        return self._place.directory is None

    @property
    def read_bytes(self) -> int:
        """How much was read from it so far."""
        return self._read_bytes

    def open(self, name: str) -> RemoteFile:
        """Return one of its files.  Raises `NetworkError`."""
        with self._lock:
            if name not in self._files:
                self._files[name] = self._place.open(name)
            return self._files[name]

    def whole_file(self, name: str, limit_bytes: int) -> bytes | None:
        """Return a whole file; None if there is none, or a longer one.  Raises `NetworkError`."""
        try:
            file = self.open(name)
            return None if file.size_bytes > limit_bytes else self._read(file, 0, file.size_bytes)
        except RemoteNotFoundError:
            return None

    def small_file(self, name: str, size_bytes: int) -> bytes | None:
        """Return a file of the model, None if there is none of that name and length."""
        return self.whole_file(name, size_bytes)

    def range_of(self, name: str, start: int, stop: int) -> bytes | None:
        """Return bytes [start, stop) of a file; None if it has none there.  Raises `NetworkError`."""
        try:
            file = self.open(name)
            return None if stop > file.size_bytes else self._read(file, start, stop)
        except RemoteNotFoundError:
            return None

    def may_have(self, partition: OpenPartition, chunk: int) -> bool:  # noqa: ARG002
        """It is the whole: it may have any chunk."""
        return True

    def stored_chunk(self, partition: OpenPartition, chunk: int, encoding: Encoding, go_on: GoOn) -> memoryview:
        """Read the chunk where it lies in the copy."""
        start, stop, _ = partition.encoded(chunk)
        file = self.open(partition.manifest.payload_file)
        if stop > file.size_bytes:
            raise IntegrityError("copy of the payload ends before the chunk", path=file.location, offset=start)
        room = encoding.scratch.take(stop - start)
        file.read_into(start, room, go_on)
        self.count(stop - start)
        return room

    def count(self, read_bytes: int) -> None:
        """Count bytes that somebody read through `open`."""
        with self._lock:
            self._read_bytes += read_bytes

    def close(self) -> None:
        """Nothing stays open."""

    def _read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        data = file.read(start, stop)
        self.count(len(data))
        return data


class CheckpointSource:
    """The checkpoint that was split.  Of a damaged chunk just its own range is read, and encoded again."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._lock = threading.Lock()
        self._shards: dict[str, RangeReader] = {}
        self._shard_bytes = {shard.name: shard.size_bytes for shard in checkpoint.shards}
        self._read_bytes = 0

    @property
    def location(self) -> str:
        """Where it is, as a person would name it."""
        return self.checkpoint.location

    @property
    def directory(self) -> Path | None:
        """Where it lies if it lies on this machine."""
        return self.checkpoint.storage.directory

    @property
    def is_remote(self) -> bool:
        """Whether it lies elsewhere."""
        return self.directory is None

    @property
    def read_bytes(self) -> int:
        """How much was read from it so far, headers left out."""
        return self._read_bytes

    def count(self, read_bytes: int) -> None:
        """Count bytes that somebody read from the checkpoint."""
        with self._lock:
            self._read_bytes += read_bytes

    def require_range(self, shard: str, start: int, stop: int) -> None:
        """Raise `CheckpointError` unless there is such a shard, and it is long enough."""
        if stop > self._shard_bytes.get(shard, -1):
            raise CheckpointError(
                "source has no such shard, or a shorter one",
                path=self.checkpoint.location_of(shard),
                offset=start,
                hint="Give the checkpoint that the set was made from.",
            )

    def may_have(self, partition: OpenPartition, chunk: int) -> bool:  # noqa: ARG002
        """It is the whole: it may have any chunk."""
        return True

    def stored_chunk(self, partition: OpenPartition, chunk: int, encoding: Encoding, go_on: GoOn) -> memoryview:
        """Read the chunk's raw bytes, compare them with the record, and encode them as the record says."""
        go_on()
        record = partition.index[chunk]
        tensor = partition.tensors[int(record["tensor"])]
        start = tensor.source_start + (chunk - tensor.first_chunk) * CHUNK_BYTES
        stop = start + int(record["raw_bytes"])
        self.require_range(tensor.shard, start, stop)
        with self._shard(tensor.shard).borrow(start, stop, encoding.scratch) as raw:
            self.count(stop - start)
            if xxhash.xxh3_64_intdigest(raw) != int(record["raw_xxh3"]):
                raise IntegrityError(
                    "source bytes are not those that were split",
                    path=self.checkpoint.location_of(tensor.shard),
                    tensor=tensor.name,
                    offset=start,
                )
            return encoding.encode(raw, tensor.dtype, int(record["codec"]))

    def small_file(self, name: str, size_bytes: int) -> bytes | None:
        """Return a file of the model, None if there is none of that name and length."""
        storage = self.checkpoint.storage
        if storage.file_bytes(name) != size_bytes:
            return None
        self.count(size_bytes)
        return storage.read_file(name)

    def close(self) -> None:
        """Close the shards."""
        for reader in self._shards.values():
            reader.close()
        self._shards.clear()

    def _shard(self, name: str) -> RangeReader:
        with self._lock:
            if name not in self._shards:
                self._shards[name] = self.checkpoint.open_shard(name, "pread")
            return self._shards[name]


RepairSource: TypeAlias = SetCopy | CheckpointSource


def open_repair_source(source: str | Path | Checkpoint, hub: HubOptions) -> RepairSource:
    """Find out what `source` is: a place with partitions is a copy of the set, any other one a checkpoint.

    Raises `RequestError`, `CheckpointError` or `NetworkError`.
    """
    if isinstance(source, Checkpoint):
        return CheckpointSource(source)
    if source == "":
        raise RequestError("the source is empty", hint="Give a checkpoint, or another copy of the set.")
    path = Path(source).expanduser()
    if isinstance(source, Path) or path.exists():
        if path.name == SET_MANIFEST_NAME or (path.is_dir() and any(path.glob("partition_*"))):
            return SetCopy(open_set_source(path, hub))
        return CheckpointSource(open_source(path, hub, allow_unknown_dtypes=True))
    if parse_hub_folder(source, hub_endpoint(hub.endpoint)).folder or hub_address_of(source, hub) is None:
        return SetCopy(open_set_source(source, hub))
    try:
        place = open_set_source(source, hub)
        place.open(SET_MANIFEST_NAME)
    except (RemoteNotFoundError, OfflineError):  # offline, the cache may have the checkpoint
        return CheckpointSource(open_source(source, hub, allow_unknown_dtypes=True))
    return SetCopy(place)


def first_that_has(
    copies: tuple[SetCopy, ...], ask: Callable[[SetCopy], bytes | None], fits: Callable[[bytes], bool]
) -> tuple[bytes, str] | None:
    """Ask copies for some bytes; return the first that fit, and where they are from.  A copy that fails has none."""
    for copy in copies:
        try:
            data = ask(copy)
        except (NetworkError, CheckpointError, IntegrityError):
            continue
        if data is not None and fits(data):
            return data, copy.location
    return None
