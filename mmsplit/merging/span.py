"""A shard in spans: its header, then runs of chunks that lie side by side in the shard and in a partition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import xxhash

from mmsplit.checkpoint import Scratch
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import IntegrityError
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import TensorEntry
from mmsplit.sidecar.partition_reader import OpenPartition
from mmsplit.sidecar.shard_writer import ShardBlock, ShardWriter


class StoredChunk(NamedTuple):
    """Chunk `number` of a partition, of `raw_bytes`."""

    partition: OpenPartition
    tensor: TensorEntry
    number: int
    raw_bytes: int


class Span(NamedTuple):
    """Shard bytes from `start` on, at most `CHUNK_BYTES`: those of `header`, or those of `chunks`."""

    shard: ShardWriter
    start: int
    header: memoryview
    chunks: tuple[StoredChunk, ...]

    def borrow(self, scratch: Scratch) -> AbstractContextManager[memoryview]:
        """Lend the bytes that the span is made from."""
        return self._borrow_stored(scratch) if self.chunks else nullcontext(self.header)

    def fill(self, block: ShardBlock, stored: memoryview, decoder: ChunkDecoder) -> None:
        """Put the span into a block, given what `borrow` lent.  Raises `IntegrityError` for a damaged chunk."""
        out = block.place(self.start, len(self.header) + sum(chunk.raw_bytes for chunk in self.chunks))
        out[: len(self.header)] = self.header
        position = 0
        for chunk in self.chunks:
            raw = out[position : position + chunk.raw_bytes]
            start, stop, encoded = chunk.partition.encoded(chunk.number)
            begin = self.chunks[0].partition.encoded(self.chunks[0].number)[0]
            with _naming(chunk):
                chunk.partition.require_bound(chunk.number, stored[start - begin : stop - begin])
                decoder.decode(stored[start - begin : stop - begin], encoded, raw)
                if xxhash.xxh3_64_intdigest(raw) != int(chunk.partition.index[chunk.number]["raw_xxh3"]):
                    raise IntegrityError("decoded bytes are not those that were split")
            position += chunk.raw_bytes

    @contextmanager
    def _borrow_stored(self, scratch: Scratch) -> Iterator[memoryview]:
        first, last = self.chunks[0], self.chunks[-1]
        start, stop = first.partition.encoded(first.number)[0], last.partition.encoded(last.number)[1]
        with _naming(first), first.partition.reader.borrow(start, stop, scratch, "direct") as stored:
            yield stored


def iter_spans(shard: ShardWriter, tensors: Sequence[tuple[OpenPartition, TensorEntry]]) -> Iterator[Span]:
    """Yield the spans of a shard in order, given its tensors in the order of the file, which they cover."""
    header = memoryview(shard.entry.header.data(shard.entry.name))
    for start in range(0, len(header), CHUNK_BYTES):
        yield Span(shard, start, header[start : start + CHUNK_BYTES], ())
    begin = position = len(header)
    waiting: list[StoredChunk] = []
    for chunk in _iter_chunks(tensors):
        if waiting and not _joins(chunk, waiting, position - begin):
            yield Span(shard, begin, memoryview(b""), tuple(waiting))
            waiting, begin = [], position
        waiting.append(chunk)
        position += chunk.raw_bytes
    if waiting:
        yield Span(shard, begin, memoryview(b""), tuple(waiting))


def _iter_chunks(tensors: Sequence[tuple[OpenPartition, TensorEntry]]) -> Iterator[StoredChunk]:
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
