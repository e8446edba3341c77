"""The one place that holds a payload's data to its index: every chunk, or some, and the bytes between them.

Used by whoever looks for damage: `verify` reports what is found, `repair` makes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsplit.checkpoint import Scratch
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import IntegrityError, MmsplitError
from mmsplit.sidecar.layout import DATA_START
from mmsplit.sidecar.pace import Pace
from mmsplit.sidecar.partition_reader import Fault, FaultKind, OpenPartition, Report
from mmsplit.workers import JobStream, ProgressCounter, WorkerGroup

#: Payload bytes that a thread takes at once.
_RANGE_BYTES: Final = 8 << 20
_EXTRA_THREADS: Final = 1

#: Which chunks of a partition to look at, one flag for each.
Wanted = NDArray[np.bool_]


class _Range(NamedTuple):
    """Payload bytes [start, stop) of a partition, padding included, which hold chunks [first, last)."""

    partition: OpenPartition
    first: int
    last: int
    start: int
    stop: int


def check_chunks(
    partition: OpenPartition,
    threads: int,
    report: Report,
    counter: ProgressCounter,
    *,
    decode: bool,
    wanted: Wanted | None = None,
    pace: Pace | None = None,
) -> int:
    """Hash every chunk, `decode` it, too, and require zeros between; return the payload bytes that were looked at.

    Digests are compared where chunks are decoded, and where a root digest is trusted; else checksums only.
    `wanted` restricts that to some chunks, each with the padding after it.  Damage goes to `report`, from any thread.
    """
    with WorkerGroup() as group:

        def make_worker() -> Callable[[_Range], None]:
            checker = _Checker(report, decode)

            def work(job: _Range) -> None:
                if pace is not None:
                    pace.take(job.stop - job.start, group.go_on)
                checker.check(job)
                counter.add(job.stop - job.start)

            return work

        jobs = JobStream(_iter_ranges(partition, wanted))
        group.start_many("verify", threads + _EXTRA_THREADS, jobs, make_worker)
    if wanted is None:
        return partition.manifest.data_stop - DATA_START
    return sum(job.stop - job.start for job in _iter_ranges(partition, wanted))


def raw_checksum(
    decoder: ChunkDecoder, scratch: Scratch, partition: OpenPartition, chunk: int, data: memoryview
) -> int:
    """Decode `data`, the stored bytes of a chunk, and return the checksum of what comes out.

    Raises `IntegrityError` if it cannot be decoded.
    """
    out = scratch.take(int(partition.index[chunk]["raw_bytes"]))
    decoder.decode(data, partition.encoded(chunk)[2], out)
    return xxhash.xxh3_64_intdigest(out)


def _iter_ranges(partition: OpenPartition, wanted: Wanted | None) -> Iterator[_Range]:
    offsets = partition.index["stored_offset"]
    first, start = 0, DATA_START
    for last in range(1, len(offsets) + 1):
        is_end = last == len(offsets)
        stop = partition.manifest.data_stop if is_end else int(offsets[last])
        changes = wanted is not None and not is_end and wanted[last] != wanted[first]
        if stop - start >= _RANGE_BYTES or is_end or changes:
            if wanted is None or wanted[first]:
                yield _Range(partition, first, last, start, stop)
            first, start = last, stop


class _Checker:
    """Checks ranges one after the other; one per thread."""

    def __init__(self, report: Report, decode: bool) -> None:
        self._report = report
        self._scratch = Scratch()
        self._decoder = ChunkDecoder() if decode else None
        self._decoded = Scratch()

    def check(self, job: _Range) -> None:
        partition, reader = job.partition, job.partition.reader
        reader.will_need(job.stop, job.stop + 2 * _RANGE_BYTES)
        try:
            with reader.borrow(job.start, job.stop, self._scratch) as view:
                position = 0
                for chunk in range(job.first, job.last):
                    record = partition.index[chunk]
                    begin = int(record["stored_offset"]) - job.start
                    end = begin + int(record["stored_bytes"])
                    self._check_padding(view[position:begin], job.start + position, job)
                    stored = view[begin:end]
                    self._check_chunk(partition, chunk, stored)
                    stored.release()
                    position = end
                self._check_padding(view[position:], job.start + position, job)
        except MmsplitError as error:
            path, part_id = str(reader.path), partition.manifest.part_id
            self._report(Fault(path, error.what, job.start, job.stop, part_id, kind="unreadable"))

    def _check_chunk(self, partition: OpenPartition, chunk: int, stored: memoryview) -> None:
        record = partition.index[chunk]
        if xxhash.xxh3_64_intdigest(stored) != int(record["stored_xxh3"]):
            self._report(chunk_fault(partition, chunk, "stored bytes are damaged", "chunk"))
        elif (self._decoder is not None or partition.is_bound) and not partition.has_digest(chunk, stored):
            what = "stored bytes are forged: they have their checksum, but not their digest"
            self._report(chunk_fault(partition, chunk, what, "chunk"))
        elif self._decoder is not None:
            try:
                if raw_checksum(self._decoder, self._decoded, partition, chunk, stored) != int(record["raw_xxh3"]):
                    what = "decoded bytes are not those that were split"
                    self._report(chunk_fault(partition, chunk, what, "decoded"))
            except IntegrityError as error:
                self._report(chunk_fault(partition, chunk, f"cannot be decoded: {error.what}", "decoded"))

    def _check_padding(self, padding: memoryview, start: int, job: _Range) -> None:
        if any(padding):
            path, part_id = str(job.partition.reader.path), job.partition.manifest.part_id
            what, stop = "padding is not zero", start + len(padding)
            self._report(Fault(path, what, start, stop, part_id, kind="padding"))
        padding.release()


def chunk_fault(partition: OpenPartition, chunk: int, what: str, kind: FaultKind) -> Fault:
    """Return a fault that says where a chunk lies and what it belongs to."""
    start, stop, _ = partition.encoded(chunk)
    tensor = partition.tensors[int(partition.index[chunk]["tensor"])]
    layer = next(
        (layer.name for layer in partition.manifest.layers if layer.stored and layer.start <= start < layer.stop),
        None,
    )
    path, part_id = str(partition.reader.path), partition.manifest.part_id
    return Fault(path, what, start, stop, part_id, layer, tensor.name, kind, chunk)
