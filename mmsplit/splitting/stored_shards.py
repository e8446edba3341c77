"""SHA-256 of source shards, computed from what the partitions store of them.

A shard that came over the network lies nowhere as a whole, and its bytes were fetched in the order of the layers.  So
it is put together again from the finished partitions, as a merge would, and hashed: what the Hub publishes is compared
with what the partitions give back, not only with what arrived.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsplit.checkpoint import ByteRange, Scratch, Shard, SourcePlace
from mmsplit.checkpoint.cover import first_byte_not_covered_once
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import IntegrityError
from mmsplit.planning import PlannedPartition, iter_stored
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import TensorEntry, manifest_name
from mmsplit.sidecar.partition_reader import OpenPartition, open_partition_files
from mmsplit.sidecar.shard_pieces import KeptPiece, arrange_shard


class StoredShard(NamedTuple):
    """A shard of which all tensors are in partitions `part_ids`; copies of them, too."""

    shard: Shard
    part_ids: tuple[int, ...]


def find_stored_shards(shards: Sequence[Shard], partitions: Sequence[PlannedPartition]) -> list[StoredShard]:
    """Return the shards of which every tensor is in `partitions`, those first that are complete first."""
    ranges: dict[str, set[ByteRange]] = {shard.name: set(shard.kept) for shard in shards}
    part_ids: dict[str, set[int]] = {shard.name: set() for shard in shards}
    for partition in partitions:
        for _, tensor in iter_stored(partition):
            own = SourcePlace(tensor.name, tensor.shard, tensor.start_offset, tensor.stop_offset)
            for place in (own, *tensor.also):
                ranges[place.shard].add((place.start_offset, place.stop_offset))
                part_ids[place.shard].add(partition.part_id)
    found = [
        StoredShard(shard, tuple(sorted(part_ids[shard.name])))
        for shard in shards
        if first_byte_not_covered_once(ranges[shard.name], shard.size_bytes) is None
    ]
    return sorted(found, key=lambda stored: (stored.part_ids[-1:], stored.shard.name))


class StoredShardHasher:
    """Hashes stored shards; holds a decoder, so one per thread."""

    def __init__(self, directory: Path, kept_of: Callable[[str], bytes], go_on: Callable[[], None]) -> None:
        """`kept_of` returns the kept bytes of a shard; `go_on` is called between chunks and may raise."""
        self._directory = directory
        self._kept_of = kept_of
        self._go_on = go_on
        self._decoder = ChunkDecoder()
        self._scratch = Scratch()
        self._chunk = np.empty(CHUNK_BYTES, np.uint8).data

    def sha256(self, stored: StoredShard, on_bytes: Callable[[int], None]) -> str | None:
        """Return 64 hex digits; None if two partitions have other bytes of the same tensor.  All must be finished.

        Reports the length of each chunk to `on_bytes`.  Raises `IntegrityError` for what cannot be decoded.
        """
        digest = hashlib.sha256()
        shard = stored.shard
        with ExitStack() as stack:
            places: dict[ByteRange, tuple[OpenPartition, TensorEntry]] = {}
            for part_id in stored.part_ids:
                path = self._directory / manifest_name(part_id)
                partition = stack.enter_context(open_partition_files(path, "pread"))
                for tensor in partition.tensors:
                    for place in tensor.places():
                        if place.shard != shard.name or not tensor.chunk_count:
                            continue
                        first = places.setdefault((place.start_offset, place.stop_offset), (partition, tensor))
                        if not np.array_equal(_raw_checksums(*first), _raw_checksums(partition, tensor)):
                            return None
            pieces = arrange_shard(list(places.items()), self._kept_of(shard.name), shard.size_bytes, shard.location)
            for piece in pieces:
                if isinstance(piece, KeptPiece):
                    digest.update(piece.data)
                    continue
                partition, tensor = piece
                for chunk in range(tensor.first_chunk, tensor.first_chunk + tensor.chunk_count):
                    self._go_on()
                    raw = self._decode(partition, tensor, chunk)
                    digest.update(raw)
                    on_bytes(len(raw))
        return digest.hexdigest()

    def _decode(self, partition: OpenPartition, tensor: TensorEntry, chunk: int) -> memoryview:
        start, stop, encoded = partition.encoded(chunk)
        raw = self._chunk[: int(partition.index[chunk]["raw_bytes"])]
        try:
            with partition.reader.borrow(start, stop, self._scratch) as data:
                is_right = partition.has_digest(chunk, data)
                is_right = is_right and xxhash.xxh3_64_intdigest(data) == int(partition.index[chunk]["stored_xxh3"])
                self._decoder.decode(data, encoded, raw)
            # Right bytes under a wrong checksum are none that anybody would get back.
            if not is_right or xxhash.xxh3_64_intdigest(raw) != int(partition.index[chunk]["raw_xxh3"]):
                raise IntegrityError("its checksums are not those of its bytes")
        except IntegrityError as error:
            raise IntegrityError(
                f"chunk that was just written is damaged: {error.what}",
                path=partition.reader.path,
                tensor=tensor.name,
                offset=start,
                hint="Suspect the disk or the memory; remove this file and run again with --resume.",
            ) from error
        return raw


def _raw_checksums(partition: OpenPartition, tensor: TensorEntry) -> NDArray[np.uint64]:
    return partition.index["raw_xxh3"][tensor.first_chunk : tensor.first_chunk + tensor.chunk_count]
