"""Where a set has the bytes of its source: which chunk of which partition holds a range of a shard.  Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from mmsplit.checkpoint import ByteRange, ShardRange
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import Manifest


class StoredTensor(NamedTuple):
    """Bytes [`start`, `stop`) of a shard, which chunks of partition `part_id` from `first_chunk` on hold."""

    start: int
    stop: int
    dtype: str
    name: str
    part_id: int
    first_chunk: int


class StoredPlace(NamedTuple):
    """Chunk number `chunk` of partition `part_id`, which holds bytes [`start`, `stop`) of a shard."""

    part_id: int
    chunk: int
    start: int
    stop: int
    tensor: str


class ChunkPlaces:
    """Finds chunks by source bytes.

    Each byte has one place, though copies of tied weights have more: of those one is chosen that is `there`.
    """

    def __init__(self, manifests: Sequence[Manifest], there: Collection[int]) -> None:
        """`there` are the ids of the partitions whose payloads can be read."""
        originals: set[ShardRange] = set()
        found: dict[ShardRange, list[StoredTensor]] = {}
        for manifest in manifests:
            for layer in manifest.layers:
                for tensor in layer.tensors if layer.stored else ():
                    for place in tensor.places():
                        where = ShardRange(place.shard, place.start_offset, place.stop_offset)
                        if where.start == where.stop:
                            continue
                        stored = StoredTensor(
                            where.start, where.stop, tensor.dtype, tensor.name, manifest.part_id, tensor.first_chunk
                        )
                        found.setdefault(where, []).append(stored)
                        if layer.alias is None:
                            originals.add(where)
        self._tensors: dict[str, list[StoredTensor]] = {}
        for where in sorted(originals):
            chosen = min(found[where], key=lambda stored: (stored.part_id not in there, stored.part_id))
            self._tensors.setdefault(where.shard, []).append(chosen)
        self._starts = {shard: [stored.start for stored in tensors] for shard, tensors in self._tensors.items()}

    def ranges(self, shard: str) -> list[ByteRange]:
        """Return the ranges of a shard that are stored, in order."""
        return [(stored.start, stored.stop) for stored in self._tensors.get(shard, ())]

    def chunk_of(self, wanted: ShardRange, dtype: str) -> StoredPlace | None:
        """Return the chunk that holds exactly these bytes, encoded as of that dtype; None if none does."""
        stored = self._tensor_at(wanted.shard, wanted.start)
        if stored is None or stored.dtype != dtype:
            return None
        place = _chunk_at(stored, wanted.start)
        return place if (place.start, place.stop) == (wanted.start, wanted.stop) else None

    def covering(self, shard: str, start: int, stop: int) -> Iterator[StoredPlace]:
        """Yield, in order, the chunks that hold bytes of [start, stop); what no tensor covers is left out."""
        tensors = self._tensors.get(shard, [])
        number = max(0, bisect_right(self._starts.get(shard, []), start) - 1)
        for stored in tensors[number:]:
            if stored.start >= stop:
                return
            position = max(start, stored.start)
            while position < min(stop, stored.stop):
                place = _chunk_at(stored, position)
                yield place
                position = place.stop

    def _tensor_at(self, shard: str, offset: int) -> StoredTensor | None:
        number = bisect_right(self._starts.get(shard, []), offset) - 1
        if number < 0:
            return None
        stored = self._tensors[shard][number]
        return stored if offset < stored.stop else None


def _chunk_at(stored: StoredTensor, offset: int) -> StoredPlace:
    number = (offset - stored.start) // CHUNK_BYTES
    start = stored.start + number * CHUNK_BYTES
    stop = min(start + CHUNK_BYTES, stored.stop)
    return StoredPlace(stored.part_id, stored.first_chunk + number, start, stop, stored.name)
