"""The chunks of a set, given to whoever writes another one: as they are stored, checked, and where possible shared."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np

from mmsplit.checkpoint import Scratch, ShardRange, ShardReaders
from mmsplit.errors import RequestError
from mmsplit.repartitioning.chunk_places import StoredPlace
from mmsplit.repartitioning.set_readers import SetReaders
from mmsplit.repartitioning.stored_set import StoredSet
from mmsplit.sidecar.block_sharing import Twin
from mmsplit.sidecar.chunk_copier import StoredChunk, raw_range
from mmsplit.sidecar.layout import CHUNK_ALIGNMENT, SLOT_ALIGNMENT, ChunkSpec, Slot, aligned


class StoredSource:
    """A set that a run takes its chunks from; counts what became of them.  Implements `SourceSet`.

    `copied_bytes` are those of encoded chunks that were written again, `shared_bytes` of those whose blocks are shared
    with the input, `encoded_bytes` the raw bytes of chunks that had to be encoded anew.
    """

    def __init__(self, stored: StoredSet) -> None:
        self._stored = stored
        self._lock = threading.Lock()
        self.copied_bytes = 0
        self.shared_bytes = 0
        self.encoded_bytes = 0
        #: Until the file system refuses.
        self.may_share = stored.directory is not None

    def stored_bytes(self, slots: Iterable[Slot]) -> int:
        """Return what slots take of a payload; what must be encoded counts as raw.

        Raises `MissingPartitionError` or `IntegrityError` if what is needed is not there.
        """
        total = 0
        for slot in slots:
            position = 0
            for chunk in slot.chunks:
                size = chunk.raw_bytes
                place = self.place_of(chunk)
                if place is not None:
                    size = int(self._stored.index(place.part_id)[place.chunk]["stored_bytes"])
                else:
                    where = raw_range(chunk)
                    for needed in self._stored.places.covering(*where):
                        self._stored.index(needed.part_id)
                position = aligned(position, CHUNK_ALIGNMENT) + size
            total += aligned(position, SLOT_ALIGNMENT)
        return total

    def chunks(self, readers: ShardReaders) -> SetChunks:
        """Return what gives the chunks."""
        if not isinstance(readers, SetReaders):
            raise RequestError("these are not readers of a partition set")
        return SetChunks(self._stored, readers, self)

    def place_of(self, chunk: ChunkSpec) -> StoredPlace | None:
        """Return where the set has exactly this chunk."""
        return self._stored.places.chunk_of(raw_range(chunk), chunk.tensor.dtype)

    def count(self, *, copied: int = 0, shared: int = 0, encoded: int = 0) -> None:
        """Count bytes; called from any thread."""
        with self._lock:
            self.copied_bytes += copied
            self.shared_bytes += shared
            self.encoded_bytes += encoded


class SetChunks:
    """Gives the chunks of one run.  Implements `StoredChunks`; `readers` stay the caller's."""

    def __init__(self, stored: StoredSet, readers: SetReaders, source: StoredSource) -> None:
        self._stored = stored
        self._readers = readers
        self._source = source
        self._own = _OfThread()

    def source_range(self, part_id: int, chunk: ChunkSpec) -> ShardRange | None:  # noqa: ARG002
        """Return what is borrowed for a chunk: the stored chunk, or the bytes that it is encoded from."""
        return self._range_of(chunk)

    @contextmanager
    def borrow(self, part_id: int, chunk: ChunkSpec, scratch: Scratch) -> Iterator[StoredChunk | None]:  # noqa: ARG002
        """Lend a chunk as the set stores it."""
        place = self._source.place_of(chunk)
        if place is None:
            self._source.count(encoded=chunk.raw_bytes)
            yield None
            return
        with self._readers.borrow_chunk(place, scratch) as stored:
            yield stored
            self._source.count(copied=len(stored.data))

    @contextmanager
    def twin_of(self, part_id: int, slot: Slot, block: memoryview) -> Iterator[Twin | None]:  # noqa: ARG002
        """Lend where the set has the very bytes of an encoded slot, padding and all."""
        place = self._source.place_of(slot.chunks[0]) if self._source.may_share else None
        if place is None:
            yield None
            return
        start = int(self._stored.index(place.part_id)[place.chunk]["stored_offset"])
        stop = start + len(block)
        if start % SLOT_ALIGNMENT or stop > self._stored.partitions[place.part_id].data_stop:
            yield None
            return
        with self._readers.borrow_payload(place.part_id, start, stop, self._own.scratch) as (fd, data):
            if not np.array_equal(np.frombuffer(data, np.uint8), np.frombuffer(block, np.uint8)):
                yield None
                return
            twin = Twin(fd, start)
            yield twin
        if twin.is_shared:
            stored_bytes = sum(stop - start for _, start, stop in map(self._range_of, slot.chunks))
            self._source.count(copied=-stored_bytes, shared=stored_bytes)
        elif twin.is_shared is False:
            self._source.may_share = False

    def close(self) -> None:
        """Nothing here is its own."""

    def _range_of(self, chunk: ChunkSpec) -> ShardRange:
        place = self._source.place_of(chunk)
        return raw_range(chunk) if place is None else self._readers.range_of(place)


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.scratch = Scratch()
