"""Which chunks of a plan have the same source bytes as a chunk of an earlier partition: copies of tied weights.  Pure.

A chunk is encoded from its raw bytes and dtype alone and refers to nothing around it, so the copy may be taken as it
is stored there.  Known from the plan, before a byte of the source is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mmsplit.planning import PlannedPartition, iter_stored
from mmsplit.sidecar.layout import CHUNK_BYTES, ChunkSpec, chunk_count_of


class ChunkPlace(NamedTuple):
    """Chunk number `chunk` of partition `part_id`."""

    part_id: int
    chunk: int


class RepeatedChunks:
    """Finds the first of several chunks with the same source bytes; "first" is by the order of `partitions`.

    Give it the partitions that one run writes, in the order in which it writes them.
    """

    def __init__(self, partitions: Iterable[PlannedPartition]) -> None:
        first: dict[tuple[str, int, int, str], ChunkPlace] = {}
        #: Place of the original's first chunk, by part_id and number of the tensor that repeats it.
        self._originals: dict[tuple[int, int], ChunkPlace] = {}
        for partition in partitions:
            next_chunk = 0
            for tensor_index, (_, tensor) in enumerate(iter_stored(partition)):
                source = (tensor.shard, tensor.start_offset, tensor.stop_offset, tensor.dtype)
                place = first.setdefault(source, ChunkPlace(partition.part_id, next_chunk))
                if place.part_id != partition.part_id:
                    self._originals[partition.part_id, tensor_index] = place
                next_chunk += chunk_count_of(tensor.size_bytes)

    def original_of(self, part_id: int, chunk: ChunkSpec) -> ChunkPlace | None:
        """Return where an earlier partition has the bytes of a chunk of partition `part_id`, or None."""
        place = self._originals.get((part_id, chunk.tensor_index))
        return None if place is None else place._replace(chunk=place.chunk + chunk.start // CHUNK_BYTES)
