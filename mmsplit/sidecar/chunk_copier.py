"""Copies of tied weights: taken, encoded as they are, from the earlier partition that holds the original.

Waiting for that partition cannot end in a deadlock.  Jobs (slots) are handed out in one order, that of the partitions
and in each that of its slots, and a thread holds one job at a time.  A job waits for earlier jobs only: for its place,
for the slots before it; for an original, for all slots of an earlier partition and its completion by whoever wrote the
last of them.  So the earliest job that is not done waits for nobody, and it has been handed out, to a thread that is
not this one.  Nobody waits while holding a permit to encode or a lock.  Where a job fails, `PayloadWriter.cancel` ends
the waiting.

Why for the partition, not for the chunk: before it is finished the file has another name, and some systems do not
rename a file that is open.  The wait is felt only where a copy stands close behind the end of the original's partition.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from mmsplit.checkpoint import Scratch, ShardRange
from mmsplit.errors import IntegrityError
from mmsplit.sidecar.block_sharing import Twin
from mmsplit.sidecar.layout import SLOT_ALIGNMENT, ChunkSpec, Slot, aligned
from mmsplit.sidecar.payload_file import BlockReader
from mmsplit.sidecar.payload_writer import PayloadWriter
from mmsplit.sidecar.repeated_chunks import ChunkPlace, RepeatedChunks


class StoredChunk(NamedTuple):
    """An encoded chunk and its index record, both as the original's partition has them."""

    data: memoryview
    record: np.void


def raw_range(chunk: ChunkSpec) -> ShardRange:
    """Return where in the source a chunk's raw bytes lie."""
    start = chunk.tensor.start_offset + chunk.start
    return ShardRange(chunk.tensor.shard, start, start + chunk.raw_bytes)


class StoredChunks(Protocol):
    """Gives chunks that are encoded already, wherever they are; shared by all threads."""

    def source_range(self, part_id: int, chunk: ChunkSpec) -> ShardRange | None:
        """Return what of the source is borrowed for a chunk of partition `part_id`; None if nothing is."""

    def borrow(self, part_id: int, chunk: ChunkSpec, scratch: Scratch) -> AbstractContextManager[StoredChunk | None]:
        """Lend the chunk until the block ends; None if it must be encoded.  Its data may lie in `scratch`.

        They have the checksum of the record; otherwise raises `IntegrityError`.
        """

    def twin_of(self, part_id: int, slot: Slot, block: memoryview) -> AbstractContextManager[Twin | None]:
        """Lend a place where exactly the bytes of `block`, an encoded slot, lie already; None if that is nowhere."""

    def close(self) -> None:
        """Let go of files; nobody may be taking a chunk."""


class ChunkCopier:
    """Reads the originals of repeated chunks; shared by all threads.  Opens each payload once, at first use."""

    def __init__(self, repeated: RepeatedChunks, writers: Mapping[int, PayloadWriter], *, direct: bool = True) -> None:
        """`writers` by part_id, for every partition that `repeated` knows; they stay the caller's."""
        self._repeated = repeated
        self._writers = writers
        self._direct = direct
        self._lock = threading.Lock()
        self._files: dict[int, BlockReader] = {}

    def source_range(self, part_id: int, chunk: ChunkSpec) -> ShardRange | None:
        """Return the bytes that a chunk is encoded from; None if `take` will have it."""
        return raw_range(chunk) if self._repeated.original_of(part_id, chunk) is None else None

    def borrow(self, part_id: int, chunk: ChunkSpec, scratch: Scratch) -> AbstractContextManager[StoredChunk | None]:
        """Lend what `take` returns."""
        return nullcontext(self.take(part_id, chunk, scratch))

    def take(self, part_id: int, chunk: ChunkSpec, scratch: Scratch) -> StoredChunk | None:
        """Return the stored original of a chunk of partition `part_id`, None if there is none.

        Waits until the original's partition is finished; call it only from a job that comes after all of its jobs.
        The data lie in `scratch`.  Raises `Stopped` if the run ends meanwhile, `IntegrityError` if the bytes
        do not have the checksum they were written with.
        """
        place = self._repeated.original_of(part_id, chunk)
        if place is None:
            return None
        writer = self._writers[place.part_id]
        writer.wait_until_finished()
        record = writer.index[place.chunk]
        start, stored_bytes = int(record["stored_offset"]), int(record["stored_bytes"])
        first = start - start % SLOT_ALIGNMENT
        blocks = scratch.take(aligned(start + stored_bytes, SLOT_ALIGNMENT) - first)
        self._file(place, writer).read_blocks(first, blocks)
        data = blocks[start - first : start - first + stored_bytes]
        if xxhash.xxh3_64_intdigest(data) != int(record["stored_xxh3"]):
            raise IntegrityError(
                "stored chunk is not what was written: a copy of it would have been wrong, too",
                path=writer.payload,
                tensor=chunk.tensor.name,
                offset=start,
                hint="Suspect the disk or the memory; remove this file and run again with --resume.",
            )
        return StoredChunk(data, record)

    def twin_of(self, part_id: int, slot: Slot, block: memoryview) -> AbstractContextManager[None]:  # noqa: ARG002
        """Copies are written, not shared: a partition stays whole if its neighbour is damaged."""
        return nullcontext()

    def close(self) -> None:
        """Close the payloads; nobody may be taking a chunk."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> ChunkCopier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, place: ChunkPlace, writer: PayloadWriter) -> BlockReader:
        with self._lock:
            file = self._files.get(place.part_id)
            if file is None:
                file = self._files[place.part_id] = BlockReader(writer.payload, direct=self._direct)
            return file
