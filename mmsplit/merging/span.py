"""A file in spans: bytes in memory, and runs of chunks that lie side by side in the file and in a partition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol, TypeAlias

import xxhash

from mmsplit.checkpoint import Scratch
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import IntegrityError
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import TensorEntry
from mmsplit.sidecar.partition_reader import OpenPartition
from mmsplit.sidecar.shard_writer import ShardBlock

#: A tensor, and the partition that stores it.
StoredTensor: TypeAlias = tuple[OpenPartition, TensorEntry]


class BlockSink(Protocol):
    """Takes the blocks of one file in order, each first to hash it, then to write it; one thread may do each."""

    def hash(self, block: ShardBlock) -> None:
        """Hash the next block."""

    def write(self, block: ShardBlock) -> None:
        """Write the next block, which has been hashed; with the last the file is made durable and gets its name."""


class Span(Protocol):
    """At most `CHUNK_BYTES` of the file that `sink` takes."""

    @property
    def sink(self) -> BlockSink: ...  # noqa: D102

    def borrow(self, scratch: Scratch) -> AbstractContextManager[memoryview]:
        """Lend the bytes that the span is made from."""

    def fill(self, block: ShardBlock, source: memoryview, decoder: ChunkDecoder) -> None:
        """Put the span into a block, given what `borrow` lent."""


class StoredChunk(NamedTuple):
    """Chunk `number` of a partition, of `raw_bytes`."""

    partition: OpenPartition
    tensor: TensorEntry
    number: int
    raw_bytes: int

    def decode(self, stored: memoryview, out: memoryview, decoder: ChunkDecoder) -> None:
        """Decode the chunk into `out` and compare its checksums.  Raises `IntegrityError` where it is not as split."""
        with _naming(self):
            self.partition.require_bound(self.number, stored)
            decoder.decode(stored, self.partition.encoded(self.number)[2], out)
            if xxhash.xxh3_64_intdigest(out) != int(self.partition.index[self.number]["raw_xxh3"]):
                raise IntegrityError("decoded bytes are not those that were split")


class StoredSpan(NamedTuple):
    """File bytes [`start`, `start + size_bytes`), at most `CHUNK_BYTES`, piece by piece.

    Pieces are bytes in memory (a header, padding) and chunks; the chunks are neighbours in one partition.
    """

    sink: BlockSink
    start: int
    size_bytes: int
    pieces: tuple[memoryview | StoredChunk, ...]

    def borrow(self, scratch: Scratch) -> AbstractContextManager[memoryview]:
        """Lend the encoded bytes of all chunks, from the first to the last."""
        chunks = [piece for piece in self.pieces if isinstance(piece, StoredChunk)]
        return _borrow_encoded(chunks[0], chunks[-1], scratch) if chunks else nullcontext(memoryview(b""))

    def fill(self, block: ShardBlock, source: memoryview, decoder: ChunkDecoder) -> None:
        """Put the pieces into a block and compare the chunks' checksums.  Raises `IntegrityError` for a damaged one."""
        out = block.place(self.start, self.size_bytes)
        position = 0
        begin: int | None = None
        for piece in self.pieces:
            if isinstance(piece, memoryview):
                out[position : position + len(piece)] = piece
                position += len(piece)
                continue
            start, stop, _ = piece.partition.encoded(piece.number)
            begin = start if begin is None else begin
            # Released at once: a view that an error's traceback holds would keep the map open.
            with source[start - begin : stop - begin] as stored:
                piece.decode(stored, out[position : position + piece.raw_bytes], decoder)
            position += piece.raw_bytes


def iter_stored(sink: BlockSink, start: int, pieces: Iterable[memoryview | StoredTensor]) -> Iterator[StoredSpan]:
    """Yield the spans of bytes and tensors that follow each other in the file from `start` on."""
    begin = position = start
    waiting: list[memoryview | StoredChunk] = []
    first: StoredChunk | None = None  # of the chunks that wait
    last: StoredChunk | None = None
    for piece in _iter_cut(pieces):
        chunk = piece if isinstance(piece, StoredChunk) else None
        size_bytes = piece.raw_bytes if isinstance(piece, StoredChunk) else len(piece)
        fits = position + size_bytes - begin <= CHUNK_BYTES
        if waiting and not (fits and _follows(chunk, first, last)):
            yield StoredSpan(sink, begin, position - begin, tuple(waiting))
            waiting, begin, first, last = [], position, None, None
        waiting.append(piece)
        position += size_bytes
        first, last = first or chunk, chunk or last
    if waiting:
        yield StoredSpan(sink, begin, position - begin, tuple(waiting))


def iter_chunks(stored: StoredTensor) -> Iterator[StoredChunk]:
    """Yield the chunks of a tensor."""
    partition, tensor = stored
    for number in range(tensor.first_chunk, tensor.first_chunk + tensor.chunk_count):
        yield StoredChunk(partition, tensor, number, int(partition.index[number]["raw_bytes"]))


def _iter_cut(pieces: Iterable[memoryview | StoredTensor]) -> Iterator[memoryview | StoredChunk]:
    for piece in pieces:
        if isinstance(piece, memoryview):
            for start in range(0, len(piece), CHUNK_BYTES):
                yield piece[start : start + CHUNK_BYTES]
        else:
            yield from iter_chunks(piece)


def _follows(chunk: StoredChunk | None, first: StoredChunk | None, last: StoredChunk | None) -> bool:
    """Whether a chunk lies right behind others in a partition, and all of them are not too much to read at once."""
    if chunk is None or first is None or last is None:
        return True
    if chunk.partition is not last.partition or chunk.number != last.number + 1:
        return False
    return chunk.partition.encoded(chunk.number)[1] - chunk.partition.encoded(first.number)[0] <= CHUNK_BYTES


@contextmanager
def _borrow_encoded(first: StoredChunk, last: StoredChunk, scratch: Scratch) -> Iterator[memoryview]:
    start, stop = first.partition.encoded(first.number)[0], last.partition.encoded(last.number)[1]
    with _naming(first), first.partition.reader.borrow(start, stop, scratch, "direct") as encoded:
        yield encoded


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
