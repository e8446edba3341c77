"""Brings chunks of a partition into memory, decoded and checked: several threads decode what is read ahead of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Final, NamedTuple

import xxhash

from mmsplit.checkpoint import Scratch
from mmsplit.checkpoint.file_reader import ReadMode
from mmsplit.checkpoint.prefetcher import Prefetcher
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import IntegrityError
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import TensorEntry
from mmsplit.sidecar.partition_reader import OpenPartition
from mmsplit.workers import WorkerGroup

#: Chunks that lie together are read together, up to so many stored bytes.
_READ_BYTES: Final = CHUNK_BYTES
#: Ranges that are read ahead of the threads that decode, besides one for each of them.
_READ_AHEAD: Final = 8


class Chunk(NamedTuple):
    """Chunk `number` of the partition; its bytes go to `raw` or, where they are used `in_place`, lie there already."""

    number: int
    tensor: TensorEntry
    raw: memoryview
    in_place: bool


def iter_chunks(tensor: TensorEntry, raw: memoryview, *, in_place: bool) -> Iterator[Chunk]:
    """Yield the chunks of a tensor, given memory of its size; `in_place` if that is a view of the payload itself."""
    for number in range(tensor.chunk_count):
        piece = raw[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
        yield Chunk(tensor.first_chunk + number, tensor, piece, in_place)


class _Range(NamedTuple):
    """Stored bytes [`start`, `stop`) of the payload and the chunks that lie in them, all or none in place."""

    start: int
    stop: int
    chunks: tuple[Chunk, ...]


class _Decoder(NamedTuple):
    chunks: ChunkDecoder
    scratch: Scratch


class ChunkLoader:
    """Loads chunks of one partition; several threads may use it at once, each for chunks of its own."""

    def __init__(self, partition: OpenPartition, threads: int) -> None:
        """`threads` decode together.  The partition stays the caller's."""
        self._partition = partition
        self._threads = threads
        self._decoders: list[_Decoder] = []  # those not in use; append and pop are atomic

    def load(self, chunks: Iterator[Chunk], mode: ReadMode, *, verify: bool) -> None:
        """Bring every chunk to its place; with `verify` compare the checksums of its raw bytes.

        Where the partition is bound by a root digest, each chunk's digest is compared before it is decoded.

        Chunks in the order of the payload are read fastest.  Raises `IntegrityError` with tensor and offset of what
        is damaged, `CheckpointError` if the disk fails; the memory then holds anything.
        """
        ranges = self._iter_ranges(chunks)
        first = list(islice(ranges, max(2, self._threads)))
        if len(first) == 1:  # threads would take longer to start than it takes
            self._load_here(first[0], mode, verify)
        elif first:
            self._load_together(min(self._threads, len(first)), chain(first, ranges), mode, verify)

    def _load_here(self, job: _Range, mode: ReadMode, verify: bool) -> None:
        decoder = self._take_decoder()
        with self._borrow(job, decoder.scratch, mode) as stored:
            self._decode(job, stored, decoder.chunks, verify)
        self._decoders.append(decoder)

    def _load_together(self, threads: int, jobs: Iterator[_Range], mode: ReadMode, verify: bool) -> None:
        prefetcher = Prefetcher(jobs, lambda job, scratch: self._borrow(job, scratch, mode), threads + _READ_AHEAD)

        def decode() -> None:
            decoder = self._take_decoder()
            while (loan := prefetcher.take()) is not None:
                with loan:
                    self._decode(loan.job, loan.data, decoder.chunks, verify)
            self._decoders.append(decoder)

        try:
            with WorkerGroup(prefetcher.cancel) as group:
                prefetcher.start(group)
                for number in range(threads):
                    group.start(f"load-{number}", decode)
        finally:
            prefetcher.close()

    def _iter_ranges(self, chunks: Iterator[Chunk]) -> Iterator[_Range]:
        """Put chunks that lie side by side into one range."""
        waiting: list[Chunk] = []
        begin = end = 0
        for chunk in chunks:
            start, stop, _ = self._partition.encoded(chunk.number)
            if waiting:
                last = waiting[-1]
                is_next = (chunk.number, chunk.in_place) == (last.number + 1, last.in_place)
                if not is_next or stop - begin > _READ_BYTES:
                    yield _Range(begin, end, tuple(waiting))
                    waiting = []
            if not waiting:
                begin = start
            waiting.append(chunk)
            end = stop
        if waiting:
            yield _Range(begin, end, tuple(waiting))

    def _take_decoder(self) -> _Decoder:
        """Take a decoder that no thread uses; fresh ones cost page faults, so they are kept from load to load."""
        try:
            return self._decoders.pop()
        except IndexError:
            return _Decoder(ChunkDecoder(), Scratch())

    @contextmanager
    def _borrow(self, job: _Range, scratch: Scratch, mode: ReadMode) -> Iterator[memoryview]:
        """Lend the stored bytes of a range; where it is used in place, see to it that they are in memory."""
        reader, first = self._partition.reader, job.chunks[0]
        with self._naming(first.tensor, job.start):
            if first.in_place:
                reader.populate(job.start, job.stop)
                yield first.raw
            else:
                with reader.borrow(job.start, job.stop, scratch, mode) as stored:
                    yield stored

    def _decode(self, job: _Range, stored: memoryview, decoder: ChunkDecoder, verify: bool) -> None:
        for chunk in job.chunks:
            start, stop, encoded = self._partition.encoded(chunk.number)
            place = slice(start - job.start, stop - job.start)
            with self._naming(chunk.tensor, start):
                self._partition.require_bound(chunk.number, chunk.raw if chunk.in_place else stored[place])
                if not chunk.in_place:
                    decoder.decode(stored[place], encoded, chunk.raw)
            if verify:
                self._require_checksum(chunk, start)

    def _require_checksum(self, chunk: Chunk, start: int) -> None:
        found, expected = xxhash.xxh3_64_intdigest(chunk.raw), int(self._partition.index[chunk.number]["raw_xxh3"])
        if found != expected:
            raise IntegrityError(
                "bytes are not those that were split",
                path=self._partition.reader.path,
                tensor=chunk.tensor.name,
                offset=start,
                expected=f"xxh3 {expected:016x}",
                found=f"xxh3 {found:016x}",
                hint=f"See all damage with: mmsplit verify {self._partition.path}",
            )

    @contextmanager
    def _naming(self, tensor: TensorEntry, offset: int) -> Iterator[None]:
        """Say of damage which tensor it is in."""
        try:
            yield
        except IntegrityError as error:
            if error.tensor is not None:
                raise
            raise IntegrityError(
                f"chunk is damaged: {error.what}", path=self._partition.reader.path, tensor=tensor.name, offset=offset
            ) from error
