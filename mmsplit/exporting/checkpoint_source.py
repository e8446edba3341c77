"""Tensors straight from a checkpoint, by a plan: no partition is written in between."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import groupby
from typing import NamedTuple

from mmsplit.checkpoint import (
    Checkpoint,
    IoMode,
    RangeReader,
    Scratch,
    ShardRange,
    ShardReaders,
    TensorInfo,
    iter_with_read_ahead,
)
from mmsplit.codec import ChunkDecoder
from mmsplit.exporting.elements import iter_elements
from mmsplit.exporting.tensor import ExportTensor, partition_of, shows_all
from mmsplit.merging.span import BlockSink, Span, iter_stored
from mmsplit.planning import Plan, sorted_part_ids
from mmsplit.planning import iter_stored as iter_stored_tensors
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.shard_writer import ShardBlock


class SourceSpan(NamedTuple):
    """File bytes from `start` on that are a range of a source shard."""

    sink: BlockSink
    start: int
    source: ShardRange
    readers: ShardReaders

    @contextmanager
    def borrow(self, scratch: Scratch) -> Iterator[memoryview]:
        """Lend the bytes of the shard."""
        with (
            self.readers.lend(self.source.shard) as reader,
            reader.borrow(self.source.start, self.source.stop, scratch) as data,
        ):
            yield data

    def fill(self, block: ShardBlock, source: memoryview, decoder: ChunkDecoder) -> None:  # noqa: ARG002
        """Copy them."""
        block.place(self.start, len(source))[:] = source


class CheckpointSource:
    """A checkpoint cut as a plan says; see `ExportSource`.  The checkpoint's shards are opened at first use."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, part_ids: Collection[int] | None, io: IoMode) -> None:
        """Take the partitions asked for, all for None.  Raises `RequestError` for one that there is not."""
        chosen = range(plan.num_parts) if part_ids is None else sorted_part_ids(part_ids, plan.num_parts)
        self._checkpoint = checkpoint
        self._io = io
        self._readers = checkpoint.open_readers(io)
        self.directory = checkpoint.storage.directory
        self.storage = checkpoint.storage
        self.model_id, self.revision = checkpoint.model_id, checkpoint.revision
        self.num_parts, self.plan_digest = plan.num_parts, plan.digest
        # Ranges of the Hub and the same shard in its cache are one source: their content is published.
        self.identity = {
            "shards": [
                [shard.name, checkpoint.published_sha256(shard.name) or list(shard.identity)]
                for shard in checkpoint.shards
            ]
        }
        self.small_files: dict[str, str | None] = dict.fromkeys(checkpoint.small_files)
        self.config = checkpoint.config
        self.notes = plan.notes
        # What comes over a network comes in one order.
        self.most_lanes = None if self.directory is not None else 1
        self.partitions = tuple(partition_of(part_id, plan.partitions[part_id].layers) for part_id in chosen)
        self._places = {
            (partition.part_id, tensor.name): tensor
            for partition in plan.partitions
            for _, tensor in iter_stored_tensors(partition)
        }

    def iter_spans(self, sink: BlockSink, start: int, tensors: Sequence[ExportTensor]) -> Iterator[Span]:
        """Yield the spans of tensors that follow each other in the file from `start` on."""
        for is_whole, run in groupby(tensors, key=lambda tensor: shows_all(tensor, self._place(tensor).size_bytes)):
            group = tuple(run)
            if is_whole:
                spans = self._iter_spans(sink, start, group)
                yield from iter_with_read_ahead(spans, self._readers, lambda span: (span.source,))
            else:
                yield from iter_stored(sink, start, self._iter_views(group))
            start += sum(tensor.size_bytes for tensor in group)

    def _iter_views(self, tensors: Sequence[ExportTensor]) -> Iterator[memoryview]:
        for tensor in tensors:
            info = self._place(tensor)
            with self._readers.lend(info.shard) as reader:
                yield from iter_elements(tensor, partial(_lend, reader, info.start_offset, Scratch()))

    def _iter_spans(self, sink: BlockSink, start: int, tensors: Sequence[ExportTensor]) -> Iterator[SourceSpan]:
        position = start
        waiting: ShardRange | None = None
        for piece in self._iter_ranges(tensors):
            if waiting is not None and not _joins(piece, waiting):
                yield SourceSpan(sink, position, waiting, self._readers)
                position += waiting.stop - waiting.start
                waiting = None
            waiting = piece if waiting is None else waiting._replace(stop=piece.stop)
        if waiting is not None:
            yield SourceSpan(sink, position, waiting, self._readers)

    def _iter_ranges(self, tensors: Sequence[ExportTensor]) -> Iterator[ShardRange]:
        for tensor in tensors:
            info = self._place(tensor)
            for start in range(info.start_offset, info.stop_offset, CHUNK_BYTES):
                yield ShardRange(info.shard, start, min(start + CHUNK_BYTES, info.stop_offset))

    def read_beginning(self, tensor: ExportTensor, size_bytes: int) -> bytes:
        """Read from the shard."""
        info = self._place(tensor)
        start = info.start_offset + (0 if tensor.view is None else tensor.view.offset_bytes)
        stop = min(start + size_bytes, info.stop_offset)
        with self._readers.lend(info.shard) as reader, reader.borrow(start, stop, Scratch()) as data:
            return bytes(data)

    def _place(self, tensor: ExportTensor) -> TensorInfo:
        return self._places[tensor.part_id, tensor.stored_name]

    def require_unchanged(self) -> None:
        """Raise `SourceChangedError` if a shard is not the file whose header was read any more."""
        self._checkpoint.require_unchanged()

    def cancel(self) -> None:
        """Wake every thread that waits for bytes."""
        self._readers.cancel()

    def close(self) -> None:
        """Close the shards."""
        self._readers.close()


def _lend(
    reader: RangeReader, begin: int, scratch: Scratch, start: int, stop: int
) -> AbstractContextManager[memoryview]:
    return reader.borrow(begin + start, begin + stop, scratch)


def _joins(piece: ShardRange, waiting: ShardRange) -> bool:
    return piece.shard == waiting.shard and piece.start == waiting.stop and piece.stop - waiting.start <= CHUNK_BYTES
