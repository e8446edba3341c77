"""Encodes one slot: source bytes in, a page-aligned block and its index records out."""

from __future__ import annotations

import threading
from typing import NamedTuple, TypeAlias

import numpy as np
import xxhash

from mmsplit.checkpoint import Scratch, ShardReaders, aligned_buffer
from mmsplit.codec import ChunkEncoder, CodecName
from mmsplit.digests import chunk_digest
from mmsplit.sidecar.chunk_copier import StoredChunks, raw_range
from mmsplit.sidecar.chunk_index import ChunkIndex, empty_index
from mmsplit.sidecar.layout import CHUNK_ALIGNMENT, CHUNK_BYTES, SLOT_ALIGNMENT, SLOT_BYTES, ChunkSpec, Slot, aligned

#: What a record says of a chunk but its place and tensor: stored_bytes, stored_xxh3, raw_xxh3, codec, layout,
#: stored_blake3.
_Content: TypeAlias = tuple[int, int, int, int, int, bytes]


class EncodedSlot(NamedTuple):
    """A slot ready to be written.  `block` is valid until the encoder's next slot; `stored_bytes` leaves out its
    padding; offsets in `records` count from the slot's start.
    """

    block: memoryview
    stored_bytes: int
    records: ChunkIndex


class SlotEncoder:
    """Encodes slots one after the other into a block of its own; one per thread.

    `permits` bounds how many encode at once; reading ahead of it and writing after it need no permit.  Chunks that
    `stored` has are copied from it; without it, all are encoded.
    """

    def __init__(
        self,
        readers: ShardReaders,
        codec: CodecName,
        permits: threading.Semaphore,
        stored: StoredChunks | None = None,
    ) -> None:
        self._readers = readers
        self._permits = permits
        self._stored = stored
        self._encoder = ChunkEncoder(codec, CHUNK_BYTES)
        self._block = memoryview(aligned_buffer(SLOT_BYTES))
        self._bytes = np.frombuffer(self._block, np.uint8)
        self._scratch = Scratch()

    def encode(self, part_id: int, slot: Slot) -> EncodedSlot:
        """Read and encode a slot of partition `part_id`; may wait for an earlier partition (see `chunk_copier`).

        Raises `SourceChangedError` if its bytes can no longer be read.
        """
        records = empty_index(len(slot.chunks))
        position = 0
        for number, chunk in enumerate(slot.chunks):
            begin = aligned(position, CHUNK_ALIGNMENT)
            self._bytes[position:begin] = 0
            room = self._block[begin : begin + chunk.raw_bytes]
            content = self._copy_chunk(part_id, chunk, room) or self._encode_chunk(chunk, room)
            stored_bytes, stored_xxh3, raw_xxh3, codec, layout, digest = content
            place = (begin, stored_bytes, chunk.raw_bytes)
            records[number] = (*place, stored_xxh3, raw_xxh3, chunk.tensor_index, codec, layout, 0, digest)
            position = begin + stored_bytes
        stop = aligned(position, SLOT_ALIGNMENT)
        self._bytes[position:stop] = 0
        return EncodedSlot(self._block[:stop], position, records)

    def _copy_chunk(self, part_id: int, chunk: ChunkSpec, room: memoryview) -> _Content | None:
        if self._stored is None:
            return None
        with self._stored.borrow(part_id, chunk, self._scratch) as stored:
            if stored is None:
                return None
            data, record = stored
            size = len(data)
            room[:size] = data
        raw_xxh3, codec, layout = int(record["raw_xxh3"]), int(record["codec"]), int(record["layout"])
        return size, int(record["stored_xxh3"]), raw_xxh3, codec, layout, record["stored_blake3"].tobytes()

    def _encode_chunk(self, chunk: ChunkSpec, room: memoryview) -> _Content:
        shard, start, stop = raw_range(chunk)
        with (
            self._readers.lend(shard) as reader,
            reader.borrow(start, stop, self._scratch) as raw,
            self._permits,
        ):
            raw_xxh3 = xxhash.xxh3_64_intdigest(raw)
            encoded = self._encoder.encode(raw, chunk.tensor.dtype, room)
            stored = room[: encoded.stored_bytes]
            stored_xxh3, digest = xxhash.xxh3_64_intdigest(stored), chunk_digest(stored)
        return encoded.stored_bytes, stored_xxh3, raw_xxh3, encoded.codec, encoded.layout, digest
