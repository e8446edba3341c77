"""A partition set that is read as a source: manifests first, chunk indexes when they are needed, payloads by ranges.

Each is bound by what is above it: the set manifest by its root digest, a partition's manifest by its SHA-256 there, the
chunk index by its checksum there, a chunk by its checksum in the index.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from mmsplit.checkpoint import FileReader, IoMode, ReaderPool, ShardReaders
from mmsplit.digests import sha256_of
from mmsplit.errors import (
    IntegrityError,
    MissingPartitionError,
    RemoteNotFoundError,
    RequestError,
)
from mmsplit.remote.hub_storage import HubReaders
from mmsplit.remote.remote_file import RemoteFile
from mmsplit.remote.set_source import SetSource, open_set_source
from mmsplit.remote.small_ranges import SmallRanges
from mmsplit.remote.source import HubOptions
from mmsplit.repartitioning.chunk_places import ChunkPlaces
from mmsplit.sidecar.chunk_index import ChunkIndex
from mmsplit.sidecar.manifest import Manifest, parse_manifest
from mmsplit.sidecar.partition_reader import MAX_MANIFEST_BYTES
from mmsplit.sidecar.payload_tail import find_index, has_possible_tail
from mmsplit.sidecar.piece_fetcher import FETCH_ATTEMPTS
from mmsplit.sidecar.receiving_directory import read_published_set, require_harmless
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, FileEntry, PartitionEntry, SetManifest
from mmsplit.sidecar.set_reader import open_partition_of_set, read_set_manifest, resolve_set_path

_COPY_HINT: Final = "Repair the set (mmsplit repair), or copy it again from where it came from."


class StoredSet:
    """A set at `place`.  All manifests are read at once; a payload that is missing matters when it is needed.

    Safe to share between threads.
    """

    def __init__(self, place: SetSource, manifest: SetManifest, connections: int, *, is_bound: bool) -> None:
        """`is_bound` says that the set manifest was read by a root digest that the caller trusts."""
        self.manifest = manifest
        self.is_bound = is_bound
        self._place = place
        self._connections = connections
        self._files: dict[str, RemoteFile] = {}
        self._opening, self._indexing = threading.Lock(), threading.Lock()
        self._indexes: dict[int, ChunkIndex] = {}
        require_harmless(manifest.files, place.location)
        self.partitions = tuple(self._read_manifest(entry) for entry in manifest.partitions)
        there = [entry.part_id for entry in manifest.partitions if self._is_there(entry)]
        self.places = ChunkPlaces(self.partitions, there)

    @property
    def location(self) -> str:
        """Where it is, as a person would name it; without any secret."""
        return self._place.location

    @property
    def directory(self) -> Path | None:
        """Where it lies on this machine; None for a set elsewhere."""
        return self._place.directory

    def location_of(self, name: str) -> str:
        """One of its files, as a person would name it."""
        return f"{self.location.rstrip('/')}/{name}"

    def payload_location(self, part_id: int) -> str:
        """The payload of a partition, as a person would name it."""
        return self.location_of(self.manifest.partitions[part_id].payload_file)

    def index(self, part_id: int) -> ChunkIndex:
        """Return the checked chunk index of a partition; raises `MissingPartitionError` or `IntegrityError`."""
        with self._indexing:
            if part_id not in self._indexes:
                self._indexes[part_id] = self._read_index(part_id)
            return self._indexes[part_id]

    def open_payloads(self, io: IoMode) -> ShardReaders:
        """Return readers of the payloads, which are lent by their file names."""
        if self.directory is None:
            return HubReaders(self._open, {}, SmallRanges(0), self._connections)
        return ReaderPool(lambda name: self._open_payload(name, io))

    def read_small_file(self, entry: FileEntry) -> bytes:
        """Return a file of the model.  Raises `IntegrityError` unless it is as it was written."""
        data = self._read(entry.name, entry.size_bytes)
        if sha256_of(data) != entry.sha256:
            raise IntegrityError(
                "file of the model is not as it was written",
                path=self.location_of(entry.name),
                expected=entry.sha256,
                found=sha256_of(data),
                hint=_COPY_HINT,
            )
        return data

    def _is_there(self, entry: PartitionEntry) -> bool:
        return self.directory is None or (self.directory / entry.payload_file).is_file()

    def _open(self, name: str) -> RemoteFile:
        with self._opening:
            if name not in self._files:
                self._files[name] = self._place.open(name)
            return self._files[name]

    def _open_payload(self, name: str, io: IoMode) -> FileReader:
        assert self.directory is not None
        path = self.directory / name
        try:
            return FileReader(path, io=io, changed_error=IntegrityError)
        except FileNotFoundError as error:
            raise MissingPartitionError("payload is not here", path=path, hint=_COPY_HINT) from error
        except OSError as error:
            raise IntegrityError(f"payload cannot be read: {error.strerror}", path=path) from error

    def _read(self, name: str, limit_bytes: int) -> bytes:
        """Read a whole file, of this machine or elsewhere."""
        path = self.location_of(name)
        try:
            if self.directory is None:
                return self._place.read(name, limit_bytes)
            with FileReader(self.directory / name, io="pread", changed_error=IntegrityError) as reader:
                if reader.size_bytes > limit_bytes:
                    raise IntegrityError(
                        "file is longer than what was written", path=path, expected=limit_bytes, found=reader.size_bytes
                    )
                return reader.read(0, reader.size_bytes)
        except (FileNotFoundError, RemoteNotFoundError) as error:
            raise MissingPartitionError("file of the set is not there", path=path, hint=_COPY_HINT) from error
        except OSError as error:
            raise IntegrityError(f"file of the set cannot be read: {error.strerror}", path=path) from error

    def _read_manifest(self, entry: PartitionEntry) -> Manifest:
        return parse_manifest(self._read_json(entry), self.location_of(entry.manifest_file))

    def _read_json(self, entry: PartitionEntry) -> bytes:
        found = ""
        for _ in range(1 if self.directory else FETCH_ATTEMPTS):
            data = self._read(entry.manifest_file, MAX_MANIFEST_BYTES)
            found = sha256_of(data)
            if found == entry.manifest_sha256:
                return data
        raise IntegrityError(
            "manifest is not the one that the set lists",
            path=self.location_of(entry.manifest_file),
            expected=entry.manifest_sha256,
            found=found,
            hint=_COPY_HINT,
        )

    def _read_index(self, part_id: int) -> ChunkIndex:
        if self.directory is not None:
            with open_partition_of_set(
                self.directory, self.manifest, part_id, "pread", is_bound=self.is_bound
            ) as partition:
                return partition.index
        entry, manifest = self.manifest.partitions[part_id], self.partitions[part_id]
        file = self._open(entry.payload_file)
        json = self._read_json(entry)
        if file.size_bytes == entry.payload_bytes and has_possible_tail(manifest, json, entry.payload_bytes):
            for _ in range(FETCH_ATTEMPTS):
                tail = file.read(manifest.data_stop, entry.payload_bytes)
                index = find_index(tail, manifest, json)
                if index is not None:
                    return index
        raise IntegrityError(
            "published payload has another size, or no sound chunk index",
            path=file.location,
            offset=manifest.data_stop,
            hint="Verify the set where it was published.",
        )


def open_stored_set(source: str | Path, hub: HubOptions, root_digest: str | None = None) -> StoredSet:
    """Open the set that `source` names: a directory, its set manifest, or a place as `pull` takes it.

    With `root_digest` only that very set will do.  Raises `RequestError`, `FormatError`, `IntegrityError` or
    `NetworkError`.
    """
    is_bound = root_digest is not None
    if hub.connections < 1:
        raise RequestError("cannot work without a connection", found=hub.connections)
    path = Path(source).expanduser()
    if isinstance(source, Path) or path.exists():
        root, only = resolve_set_path(path)
        if only is not None:
            raise RequestError(
                "one partition is not the whole model", path=path, hint=f"Give the directory of its set: {root}"
            )
        local = read_set_manifest(root, root_digest)
        return StoredSet(open_set_source(root), local, hub.connections, is_bound=is_bound)
    place = open_set_source(source, hub)
    published = read_published_set(place.open(SET_MANIFEST_NAME), root_digest)
    return StoredSet(place, published.manifest, hub.connections, is_bound=is_bound)
