"""A shard in spans: kept bytes, and runs of chunks that lie side by side in the shard and in a partition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypeAlias

import xxhash

from mmsplit.checkpoint import Scratch
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import IntegrityError
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import TensorEntry
from mmsplit.sidecar.partition_reader import OpenPartition
from mmsplit.sidecar.shard_pieces import KeptPiece
from mmsplit.sidecar.shard_writer import ShardBlock, ShardWriter

#: A tensor, and the partition that stores it.
StoredTensor: TypeAlias = tuple[OpenPartition, TensorEntry]


class StoredChunk(NamedTuple):
    """Chunk `number` of a partition, of `raw_bytes`."""

    partition: OpenPartition
    tensor: TensorEntry
    number: int
    raw_bytes: int


class Span(NamedTuple):
    """Shard bytes [`start`, `start + size_bytes`), at most `CHUNK_BYTES`, piece by piece.

    The chunks among the pieces are neighbours in one partition.
    """

    shard: ShardWriter
    start: int
    size_bytes: int
    pieces: tuple[memoryview | StoredChunk, ...]

    def borrow(self, scratch: Scratch) -> AbstractContextManager[memoryview]:
        """Lend the stored bytes of all chunks, from the first to the last."""
        chunks = self._chunks()
        return self._borrow_stored(chunks, scratch) if chunks else nullcontext(memoryview(b""))

    def fill(self, block: ShardBlock, stored: memoryview, decoder: ChunkDecoder) -> None:
        """Put the span into a block, given what `borrow` lent.  Raises `IntegrityError` for a damaged chunk."""
        out = block.place(self.start, self.size_bytes)
        position = 0
        begin = None
        for piece in self.pieces:
            if isinstance(piece, memoryview):
                out[position : position + len(piece)] = piece
                position += len(piece)
                continue
            raw = out[position : position + piece.raw_bytes]
            start, stop, encoded = piece.partition.encoded(piece.number)
            begin = start if begin is None else begin
            with _naming(piece):
                piece.partition.require_bound(piece.number, stored[start - begin : stop - begin])
                decoder.decode(stored[start - begin : stop - begin], encoded, raw)
                if xxhash.xxh3_64_intdigest(raw) != int(piece.partition.index[piece.number]["raw_xxh3"]):
                    raise IntegrityError("decoded bytes are not those that were split")
            position += piece.raw_bytes

    def _chunks(self) -> list[StoredChunk]:
        return [piece for piece in self.pieces if isinstance(piece, StoredChunk)]

    @contextmanager
    def _borrow_stored(self, chunks: Sequence[StoredChunk], scratch: Scratch) -> Iterator[memoryview]:
        first, last = chunks[0], chunks[-1]
        start, stop = first.partition.encoded(first.number)[0], last.partition.encoded(last.number)[1]
        with _naming(first), first.partition.reader.borrow(start, stop, scratch, "direct") as stored:
            yield stored


def iter_spans(shard: ShardWriter, pieces: Iterable[KeptPiece | StoredTensor]) -> Iterator[Span]:
    """Yield the spans of a shard in order, given its pieces in the order of the file, which they cover."""
    begin = position = 0
    waiting: list[memoryview | StoredChunk] = []
    first: StoredChunk | None = None  # of the chunks that wait
    last: StoredChunk | None = None
    for piece in _iter_pieces(pieces):
        chunk = piece if isinstance(piece, StoredChunk) else None
        size_bytes = piece.raw_bytes if isinstance(piece, StoredChunk) else len(piece)
        fits = position + size_bytes - begin <= CHUNK_BYTES
        if waiting and not (fits and _follows(chunk, first, last)):
            yield Span(shard, begin, position - begin, tuple(waiting))
            waiting, begin, first, last = [], position, None, None
        waiting.append(piece)
        position += size_bytes
        first, last = first or chunk, chunk or last
    if waiting:
        yield Span(shard, begin, position - begin, tuple(waiting))


def _iter_pieces(pieces: Iterable[KeptPiece | StoredTensor]) -> Iterator[memoryview | StoredChunk]:
    for piece in pieces:
        if isinstance(piece, KeptPiece):
            for start in range(0, len(piece.data), CHUNK_BYTES):
                yield piece.data[start : start + CHUNK_BYTES]
        else:
            partition, tensor = piece
            for number in range(tensor.first_chunk, tensor.first_chunk + tensor.chunk_count):
                yield StoredChunk(partition, tensor, number, int(partition.index[number]["raw_bytes"]))


def _follows(chunk: StoredChunk | None, first: StoredChunk | None, last: StoredChunk | None) -> bool:
    """Whether a chunk lies right behind others in a partition, and all of them are not too much to read at once."""
    if chunk is None or first is None or last is None:
        return True
    if chunk.partition is not last.partition or chunk.number != last.number + 1:
        return False
    return chunk.partition.encoded(chunk.number)[1] - chunk.partition.encoded(first.number)[0] <= CHUNK_BYTES


@contextmanager
def _naming(chunk: StoredChunk) -> Iterator[None]:
    """Say of damage which chunk it is in."""
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(
            f"chunk is damaged: {error.what}",
            path=chunk.partition.reader.path,
            tensor=chunk.tensor.name,
            offset=chunk.partition.encoded(chunk.number)[0],
            hint=f"See all damage with: mmsplit verify {chunk.partition.path}",
        ) from error
