"""A payload's data cut into pieces that are fetched, checked and written each for itself.  Pure.

A piece is a run of whole chunks.  It ends where a chunk begins on a block of the disk, as every slot does, so that
pieces can be written past the page cache; and it never grows beyond `PIECE_BYTES`, whatever the index says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import xxhash

from mmsplit.digests import chunk_digest
from mmsplit.sidecar.chunk_index import ChunkIndex
from mmsplit.sidecar.layout import SLOT_ALIGNMENT, SLOT_BYTES
from mmsplit.sidecar.manifest import Manifest

#: Room for any piece: a slot, or one chunk with the padding after it.
PIECE_BYTES: Final = SLOT_BYTES + SLOT_ALIGNMENT


class Piece(NamedTuple):
    """Chunks [`first`, `last`), which with the padding after each take payload bytes [`start`, `stop`)."""

    first: int
    last: int
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """Length in the payload."""
        return self.stop - self.start

    @property
    def is_aligned(self) -> bool:
        """Whether it begins and ends on a block."""
        return self.start % SLOT_ALIGNMENT == 0 and self.stop % SLOT_ALIGNMENT == 0


class PayloadPieces:
    """The pieces of one payload, numbered from 0.  `index` must be sound (`chunk_index.find_fault`)."""

    def __init__(self, index: ChunkIndex, data_stop: int) -> None:
        self._index = index
        self._data_stop = data_stop
        self._first = np.array(_first_chunks(index, data_stop), np.int64)

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, number: int) -> Piece:
        if not 0 <= number < len(self._first):
            raise IndexError(number)
        first = int(self._first[number])
        if number + 1 == len(self._first):
            return Piece(first, len(self._index), self._offset(first), self._data_stop)
        last = int(self._first[number + 1])
        return Piece(first, last, self._offset(first), self._offset(last))

    def __iter__(self) -> Iterator[Piece]:
        return (self[number] for number in range(len(self)))

    @property
    def size_bytes(self) -> int:
        """Length of all pieces together."""
        return self._data_stop - self._offset(0) if len(self) else 0

    def first_damaged(self, piece: Piece, data: memoryview) -> int | None:
        """Return the first chunk whose bytes have another checksum or digest than the index says; None if none has."""
        for chunk, (begin, end) in self._places(piece):
            record, stored = self._index[chunk], data[begin:end]
            if xxhash.xxh3_64_intdigest(stored) != int(record["stored_xxh3"]):
                return chunk
            if chunk_digest(stored) != record["stored_blake3"].tobytes():
                return chunk
        return None

    def is_intact(self, piece: Piece, data: memoryview) -> bool:
        """Whether all is as it was written: every chunk, and every byte between them zero."""
        return self.first_damaged(piece, data) is None and not any(any(data[a:b]) for a, b in self._padding(piece))

    def clear_padding(self, piece: Piece, data: memoryview) -> None:
        """Make every byte of the piece that belongs to no chunk zero, which is what was written there."""
        for begin, end in self._padding(piece):
            data[begin:end] = bytes(end - begin)

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Return the payload range [start, stop) of a chunk."""
        start = self._offset(chunk)
        return start, start + int(self._index[chunk]["stored_bytes"])

    def tensor_of(self, chunk: int, manifest: Manifest) -> str:
        """Return the name of the tensor that a chunk belongs to."""
        return manifest.stored_tensors()[int(self._index[chunk]["tensor"])].name

    def _offset(self, chunk: int) -> int:
        return int(self._index[chunk]["stored_offset"])

    def _places(self, piece: Piece) -> Iterator[tuple[int, tuple[int, int]]]:
        for chunk in range(piece.first, piece.last):
            start, stop = self.chunk_range(chunk)
            yield chunk, (start - piece.start, stop - piece.start)

    def _padding(self, piece: Piece) -> Iterator[tuple[int, int]]:
        position = 0
        for _, (begin, end) in self._places(piece):
            yield position, begin
            position = end
        yield position, piece.size_bytes


def _first_chunks(index: ChunkIndex, data_stop: int) -> list[int]:
    """Return the chunk that each piece begins with."""
    offsets = index["stored_offset"].tolist()
    firsts: list[int] = []
    start = 0
    for chunk, (offset, end) in enumerate(zip(offsets, [*offsets[1:], data_stop], strict=False)):
        if not firsts or offset % SLOT_ALIGNMENT == 0 or end - start > PIECE_BYTES:
            firsts.append(chunk)
            start = offset
    return firsts
