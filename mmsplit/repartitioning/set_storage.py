"""The checkpoint that a partition set stands for, opened as any other: same headers, same config, same plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mmsplit.checkpoint import Checkpoint, Identity, IoMode, read_checkpoint
from mmsplit.checkpoint.directory import CheckpointFiles
from mmsplit.errors import CheckpointError, IntegrityError
from mmsplit.repartitioning.set_readers import SetReaders, SetShardReader
from mmsplit.repartitioning.stored_set import StoredSet
from mmsplit.sidecar.set_manifest import FileEntry, ShardEntry
from mmsplit.splitting import fold


class SetStorage:
    """The shards and small files of a set's source.  Implements `Storage`."""

    def __init__(self, stored: StoredSet) -> None:
        self._stored = stored
        self._shards: Mapping[str, ShardEntry] = {entry.name: entry for entry in stored.manifest.shards}
        self._files: Mapping[str, FileEntry] = {entry.name: entry for entry in stored.manifest.files}
        self.location = stored.location
        self.directory = stored.directory
        self.moved_bytes = None
        self.model = (stored.manifest.model_id, stored.manifest.revision)

    def location_of(self, name: str) -> str:
        """Place of a file; shards are not files of the set, but belong to it."""
        return self._stored.location_of(name)

    def names(self) -> list[str]:
        """Sorted names of the shards and of the small files beside them."""
        return sorted([*self._shards, *(name for name in self._files if "/" not in name)])

    def walk(self, deep: bool, notes: list[str]) -> Iterator[tuple[str, int | None]]:  # noqa: ARG002
        """Yield name and length of every file."""
        for name in [*self._shards, *self._files]:
            if deep or "/" not in name:
                yield name, self.file_bytes(name)

    def file_bytes(self, name: str) -> int | None:
        """Length of a shard or small file, or None."""
        entry = self._shards.get(name) or self._files.get(name)
        return None if entry is None else entry.size_bytes

    def read_file(self, name: str) -> bytes:
        """Read a small file and compare its digest."""
        if name not in self._files:
            raise CheckpointError("the set has no such file of the model", path=self.location_of(name))
        return self._stored.read_small_file(self._files[name])

    def identity_of(self, name: str) -> Identity:
        """Length, and the set's root digest, which stands for all of it."""
        return self._shards[name].size_bytes, self._stored.manifest.root_digest

    def require_unchanged(self, identities: Mapping[str, Identity]) -> None:
        """Every chunk was held to its checksum when it was read."""

    def open_shard(self, name: str, io: IoMode, identity: Identity | None = None) -> SetShardReader:  # noqa: ARG002
        """Open one shard by itself."""
        readers = SetReaders(self._stored, self._stored.open_payloads(io))
        return SetShardReader(self._stored, readers, name, owns_readers=True)

    def open_readers(self, io: IoMode, identities: Mapping[str, Identity]) -> SetReaders:  # noqa: ARG002
        """Return readers of all shards that share the payloads."""
        return SetReaders(self._stored, self._stored.open_payloads(io))

    def published_sha256(self, name: str) -> None:
        """What is known of a shard's digest is in the set manifest, which is taken over."""


def read_set_checkpoint(stored: StoredSet) -> Checkpoint:
    """Read the headers of the source out of a set.

    Raises `IntegrityError` if they are not those that its partitions were made from.
    """
    manifest = stored.manifest
    index_name, index = manifest.weights_index or (None, None)
    files = CheckpointFiles(
        SetStorage(stored),
        tuple(entry.name for entry in manifest.shards),
        index_name,
        b"" if index is None else index.data(stored.location_of(index_name or "")),
        None,
        tuple(entry.name for entry in manifest.files),
        (),
    )
    # What was split is known to be carried as it is, whatever its dtypes.
    return _with_repeats(read_checkpoint(files, allow_unknown_dtypes=True), stored)


def _with_repeats(checkpoint: Checkpoint, stored: StoredSet) -> Checkpoint:
    """Store once what the set stores once: tensors with equal bytes, which no header speaks of."""
    same_as = {
        place.name: tensor.name
        for manifest in stored.partitions
        for tensor in manifest.stored_tensors()
        for place in tensor.also
        if place.name in checkpoint.tensors
    }
    missing = next((name for name in same_as.values() if name not in checkpoint.tensors), None)
    if missing is not None:
        raise IntegrityError(
            "tensor is not in the headers", path=stored.location, tensor=missing, hint="Verify the set."
        )
    return fold(checkpoint, same_as, ()) if same_as else checkpoint
