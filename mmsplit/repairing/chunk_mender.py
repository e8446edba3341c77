"""Damaged chunks made again, in place, each verified before it is written and read back after.

Exactly the bytes of a damaged chunk are written, nothing beside it: it was lost already, so a write that is cut short
at any byte loses nothing.  What shares a block of the disk with it is written back by the kernel as it was read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from mmsplit.checkpoint import Scratch
from mmsplit.codec import ChunkDecoder
from mmsplit.errors import CheckpointError, IntegrityError, MmsplitError, NetworkError, RequestError
from mmsplit.remote.remote_file import GoOn
from mmsplit.repairing.ledger import Ledger, Mended
from mmsplit.repairing.sources import ChunkSource, Encoding
from mmsplit.sidecar.chunk_check import Wanted, check_chunks, chunk_fault, raw_checksum
from mmsplit.sidecar.output_files import output_errors
from mmsplit.sidecar.partition_reader import Fault, OpenPartition
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.sidecar.piece_fetcher import FETCH_ATTEMPTS
from mmsplit.workers import JobStream, ProgressCounter, WorkerGroup


class Damage(NamedTuple):
    """What is wrong with a payload's data: chunks by number, padding by byte range, and what cannot be mended."""

    chunks: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    hopeless: tuple[Fault, ...]


def find_damage(
    partition: OpenPartition, threads: int, counter: ProgressCounter, *, look: bool, decode: bool
) -> Damage:
    """Look at all data, or unless `look` only at what the file ends before: that is damaged in any case."""
    lock = threading.Lock()
    faults: list[Fault] = []

    def report(fault: Fault) -> None:
        with lock:
            faults.append(fault)

    there = _is_there(partition)
    if look:
        check_chunks(partition, threads, report, counter, decode=decode, wanted=there)
    unread = [
        chunk
        for fault in faults
        if fault.kind == "unreadable" and fault.start is not None and fault.stop is not None
        for chunk in _chunks_between(partition, fault.start, fault.stop)
    ]
    # One block that the disk refuses makes a whole range unreadable: chunk by chunk, most of it can be read.
    maybe = {*np.flatnonzero(~there).tolist(), *unread}
    damaged = {fault.chunk for fault in faults if fault.kind == "chunk" and fault.chunk is not None}
    damaged |= {chunk for chunk in maybe if not _is_intact(partition, chunk)}
    padding = [(f.start, f.stop) for f in faults if f.kind == "padding" and f.start is not None and f.stop is not None]
    hopeless = tuple(fault for fault in faults if fault.kind == "decoded")
    return Damage(tuple(sorted(damaged)), tuple(sorted(padding)), hopeless)


def _is_there(partition: OpenPartition) -> Wanted:
    """Flag the chunks that lie, with the padding behind them, within the file."""
    offsets = partition.index["stored_offset"].astype(np.int64)
    stops = np.append(offsets[1:], partition.manifest.data_stop)[: len(offsets)]
    there: Wanted = stops <= partition.reader.size_bytes
    return there


def _chunks_between(partition: OpenPartition, start: int, stop: int) -> range:
    offsets = partition.index["stored_offset"]
    return range(int(np.searchsorted(offsets, np.uint64(start))), int(np.searchsorted(offsets, np.uint64(stop))))


def _is_intact(partition: OpenPartition, chunk: int) -> bool:
    start, stop, _ = partition.encoded(chunk)
    if stop > partition.reader.size_bytes:
        return False
    try:
        with partition.reader.borrow(start, stop, Scratch()) as view:
            return partition.has_digest(chunk, view)
    except (CheckpointError, IntegrityError):
        return False


class ChunkMender:
    """Mends chunks of one payload from `sources`, in their order; `out` is open for writing.

    What cannot be mended goes to `ledger`, with the reason of each source.
    """

    def __init__(
        self, partition: OpenPartition, sources: Sequence[ChunkSource], out: PayloadFile, ledger: Ledger
    ) -> None:
        self._partition = partition
        self._sources = sources
        self._out = out
        self._ledger = ledger
        self._lock = threading.Lock()
        self._silent: dict[int, str] = {}
        self._mended: dict[int, str] = {}

    def mend(self, chunks: Sequence[int], threads: int, counter: ProgressCounter) -> None:
        """Make these chunks again, several at once.  Raises `OutputError`; a source that fails is passed over."""
        with WorkerGroup() as group:

            def make_worker() -> Callable[[int], None]:
                encoding, check = Encoding(), _RecordCheck(self._partition)

                def work(chunk: int) -> None:
                    self._mend_chunk(chunk, encoding, check, group.go_on)
                    start, stop, _ = self._partition.encoded(chunk)
                    counter.add(stop - start)

                return work

            group.start_many("repair", min(threads, len(chunks)), JobStream(iter(chunks)), make_worker)

    def confirm(self, partition: OpenPartition) -> None:
        """Read what was written back, from the disk, and note what became of it.  Call when `out` is synced."""
        check, scratch = _RecordCheck(partition), Scratch()
        _forget_cached(partition.reader.path)
        for chunk, source in sorted(self._mended.items()):
            start, stop, _ = partition.encoded(chunk)
            try:
                with partition.reader.borrow(start, stop, scratch) as view:
                    check.require(chunk, view)
            except MmsplitError as error:
                what = f"was made again, but does not read back: {error.what}"
                self._ledger.leave(chunk_fault(partition, chunk, what, "chunk"))
                continue
            self._ledger.mend(chunk_mended(partition, chunk, source))

    def _mend_chunk(self, chunk: int, encoding: Encoding, check: _RecordCheck, go_on: GoOn) -> None:
        reasons = []
        for number, source in enumerate(self._sources):
            if not source.may_have(self._partition, chunk):
                continue
            if number in self._silent:
                reasons.append(self._silent[number])
                continue
            try:
                data = self._right_chunk(source, chunk, encoding, check, go_on)
            except (IntegrityError, CheckpointError, RequestError) as error:
                reasons.append(f"{source.location}: {error.what}")
                continue
            except NetworkError as error:
                reasons.append(f"{source.location}: {error.what}")
                with self._lock:  # whoever does not answer is not asked for every chunk
                    self._silent[number] = reasons[-1]
                continue
            self._out.write(self._partition.encoded(chunk)[0], data)
            with self._lock:
                self._mended[chunk] = source.location
            return
        why = "; ".join(reasons) or "no source was given"
        self._ledger.leave(chunk_fault(self._partition, chunk, f"stored bytes are damaged ({why})", "chunk"))

    def _right_chunk(
        self, source: ChunkSource, chunk: int, encoding: Encoding, check: _RecordCheck, go_on: GoOn
    ) -> memoryview:
        """Ask a source for a chunk; what arrives wrong over a network is asked for again."""
        attempts = FETCH_ATTEMPTS if source.is_remote else 1
        while True:
            try:
                data = source.stored_chunk(self._partition, chunk, encoding, go_on)
                check.require(chunk, data)
                return data
            except IntegrityError:
                attempts -= 1
                if not attempts:
                    raise


class _RecordCheck:
    """Holds bytes to the record of a chunk: length, checksum, digest, and what they decode to; one per thread."""

    def __init__(self, partition: OpenPartition) -> None:
        self._partition = partition
        self._decoder = ChunkDecoder()
        self._scratch = Scratch()

    def require(self, chunk: int, data: memoryview) -> None:
        """Raise `IntegrityError` unless these are the stored bytes of the chunk."""
        record = self._partition.index[chunk]
        if (
            len(data) != int(record["stored_bytes"])
            or xxhash.xxh3_64_intdigest(data) != int(record["stored_xxh3"])
            or not self._partition.has_digest(chunk, data)
        ):
            raise IntegrityError("it does not give the bytes that were stored")
        if raw_checksum(self._decoder, self._scratch, self._partition, chunk, data) != int(record["raw_xxh3"]):
            raise IntegrityError("decoded bytes are not those that were split")


def chunk_mended(partition: OpenPartition, chunk: int, source: str | None) -> Mended:
    """Return what the ledger says of a chunk that was, or would be, made again."""
    fault = chunk_fault(partition, chunk, "chunk", "chunk")
    return Mended(fault.file, "chunk", source, fault.start, fault.stop, fault.partition, fault.tensor)


def _forget_cached(path: Path) -> None:
    """Let the kernel drop what it has of a file, so that it is read from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    with output_errors(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
