"""Tensors straight from a checkpoint, by a plan: no partition is written in between."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from mmsplit.checkpoint import Checkpoint, IoMode, Scratch, ShardRange, ShardReaders, TensorInfo, iter_with_read_ahead
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import RequestError
from mmsplit.exporting.tensor import ExportPartition, ExportTensor, partition_of
from mmsplit.merging.span import BlockSink
from mmsplit.planning import Plan, sorted_part_ids
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
        self.notes = plan.notes
        # What comes over a network comes in one order.
        self.most_lanes = None if self.directory is not None else 1
        views = aliases_of_views(checkpoint.views, checkpoint.tensors)
        self.partitions = tuple(
            _with_views(partition_of(part_id, plan.partitions[part_id].layers), views) for part_id in chosen
        )

    def iter_spans(self, sink: BlockSink, start: int, tensors: Sequence[ExportTensor]) -> Iterator[SourceSpan]:
        """Yield the spans of tensors that follow each other in the file from `start` on."""
        return iter_with_read_ahead(self._iter_spans(sink, start, tensors), self._readers, lambda span: (span.source,))

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
            info = self._checkpoint.tensors[tensor.name]
            for start in range(info.start_offset, info.stop_offset, CHUNK_BYTES):
                yield ShardRange(info.shard, start, min(start + CHUNK_BYTES, info.stop_offset))

    def read_beginning(self, tensor: ExportTensor, size_bytes: int) -> bytes:
        """Read from the shard."""
        info = self._checkpoint.tensors[tensor.name]
        stop = min(info.start_offset + size_bytes, info.stop_offset)
        with (
            self._readers.lend(info.shard) as reader,
            reader.borrow(info.start_offset, stop, Scratch()) as data,
        ):
            return bytes(data)

    def require_unchanged(self) -> None:
        """Raise `SourceChangedError` if a shard is not the file whose header was read any more."""
        self._checkpoint.require_unchanged()

    def cancel(self) -> None:
        """Wake every thread that waits for bytes."""
        self._readers.cancel()

    def close(self) -> None:
        """Close the shards."""
        self._readers.close()


def _joins(piece: ShardRange, waiting: ShardRange) -> bool:
    return piece.shard == waiting.shard and piece.start == waiting.stop and piece.stop - waiting.start <= CHUNK_BYTES


class View(Protocol):
    """A name of the state dict that is seen in the bytes of a stored tensor, `base`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def stride(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def offset_bytes(self) -> int: ...  # noqa: D102
    @property
    def base(self) -> str: ...  # noqa: D102


def aliases_of_views(views: Mapping[str, View], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Return the names that are another name of a whole stored tensor, each with the stored name.

    This is the one place that decides what becomes of views.  Safetensors has no strides: a transposed, sliced or
    expanded view would have to be gathered, and is refused.  Raises `RequestError` naming it.
    """
    aliases = {}
    for name, view in views.items():
        base = tensors[view.base]
        same = (view.dtype, view.shape, view.offset_bytes) == (base.dtype, base.shape, 0)
        if not same or not _is_contiguous(view.shape, view.stride):
            raise RequestError(
                "tensor is a view of a part of another one, or of its elements in another order, which safetensors"
                " cannot say",
                tensor=name,
                found=f"a view of {view.base}",
                hint="Save the model once more with a contiguous tensor in its place.",
            )
        aliases[name] = view.base
    return aliases


def _is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements lie in order; the stride of a dimension of one element says nothing."""
    step = 1
    for size, found in zip(reversed(shape), reversed(stride), strict=True):
        if size > 1 and found != step:
            return False
        step *= size
    return True


def _with_views(partition: ExportPartition, views: Mapping[str, str]) -> ExportPartition:
    stored = {tensor.name for tensor in partition.tensors}
    here = {alias: base for alias, base in views.items() if base in stored}
    return partition._replace(aliases={**partition.aliases, **here})
