"""A file in spans: bytes in memory, and runs of chunks that lie side by side in the file and in a partition."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import xxhash

from mmsplit.checkpoint import Scratch
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import IntegrityError
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import TensorEntry
from mmsplit.sidecar.partition_reader import OpenPartition
from mmsplit.sidecar.shard_writer import ShardBlock


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


class BytesSpan(NamedTuple):
    """File bytes from `start` on that are in memory, such as a header."""

    sink: BlockSink
    start: int
    data: memoryview

    def borrow(self, scratch: Scratch) -> AbstractContextManager[memoryview]:  # noqa: ARG002
        """Lend what is there."""
        return nullcontext(self.data)

    def fill(self, block: ShardBlock, source: memoryview, decoder: ChunkDecoder) -> None:  # noqa: ARG002
        """Copy it."""
        block.place(self.start, len(source))[:] = source


class StoredChunk(NamedTuple):
    """Chunk `number` of a partition, of `raw_bytes`."""

    partition: OpenPartition
    tensor: TensorEntry
    number: int
    raw_bytes: int

    def decode(self, stored: memoryview, out: memoryview, decoder: ChunkDecoder) -> None:
        """Decode the chunk into `out` and compare its checksum.  Raises `IntegrityError` if it is damaged."""
        with _naming(self):
            decoder.decode(stored, self.partition.encoded(self.number)[2], out)
            if xxhash.xxh3_64_intdigest(out) != int(self.partition.index[self.number]["raw_xxh3"]):
                raise IntegrityError("decoded bytes are not those that were split")


class StoredSpan(NamedTuple):
    """File bytes from `start` on that are the raw bytes of `chunks`, neighbours in a partition."""

    sink: BlockSink
    start: int
    chunks: tuple[StoredChunk, ...]

    @contextmanager
    def borrow(self, scratch: Scratch) -> Iterator[memoryview]:
        """Lend the encoded chunks."""
        first, last = self.chunks[0], self.chunks[-1]
        start, stop = first.partition.encoded(first.number)[0], last.partition.encoded(last.number)[1]
        with _naming(first), first.partition.reader.borrow(start, stop, scratch, "direct") as stored:
            yield stored

    def fill(self, block: ShardBlock, source: memoryview, decoder: ChunkDecoder) -> None:
        """Decode the chunks into a block and compare their checksums.  Raises `IntegrityError` for a damaged one."""
        out = block.place(self.start, sum(chunk.raw_bytes for chunk in self.chunks))
        begin = self.chunks[0].partition.encoded(self.chunks[0].number)[0]
        position = 0
        for chunk in self.chunks:
            start, stop, _ = chunk.partition.encoded(chunk.number)
            # Released at once: a view that an error's traceback holds would keep the map open.
            with source[start - begin : stop - begin] as stored:
                chunk.decode(stored, out[position : position + chunk.raw_bytes], decoder)
            position += chunk.raw_bytes


def iter_bytes(sink: BlockSink, start: int, data: memoryview) -> Iterator[BytesSpan]:
    """Yield the spans of bytes that are in memory and lie in the file from `start` on."""
    for position in range(0, len(data), CHUNK_BYTES):
        yield BytesSpan(sink, start + position, data[position : position + CHUNK_BYTES])


def iter_stored(
    sink: BlockSink, start: int, tensors: Sequence[tuple[OpenPartition, TensorEntry]]
) -> Iterator[StoredSpan]:
    """Yield the spans of tensors that follow each other in the file from `start` on."""
    begin = position = start
    waiting: list[StoredChunk] = []
    for chunk in iter_chunks(tensors):
        if waiting and not _joins(chunk, waiting, position - begin):
            yield StoredSpan(sink, begin, tuple(waiting))
            waiting, begin = [], position
        waiting.append(chunk)
        position += chunk.raw_bytes
    if waiting:
        yield StoredSpan(sink, begin, tuple(waiting))


def iter_chunks(tensors: Iterable[tuple[OpenPartition, TensorEntry]]) -> Iterator[StoredChunk]:
    """Yield the chunks of tensors."""
    for partition, tensor in tensors:
        for number in range(tensor.first_chunk, tensor.first_chunk + tensor.chunk_count):
            yield StoredChunk(partition, tensor, number, int(partition.index[number]["raw_bytes"]))


def _joins(chunk: StoredChunk, waiting: Sequence[StoredChunk], raw_bytes: int) -> bool:
    """Whether a chunk lies right behind those that wait, and all of them are not too much for one span."""
    first, last = waiting[0], waiting[-1]
    if chunk.partition is not last.partition or chunk.number != last.number + 1:
        return False
    stored_bytes = chunk.partition.encoded(chunk.number)[1] - chunk.partition.encoded(first.number)[0]
    return max(raw_bytes + chunk.raw_bytes, stored_bytes) <= CHUNK_BYTES


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
