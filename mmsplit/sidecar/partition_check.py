"""Whether a partition on disk is the one that its set lists, to the last stored byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmsplit.checkpoint import FileReader, Scratch
from mmsplit.errors import CheckpointError, FormatError, IntegrityError, MmsplitError
from mmsplit.sidecar.output_files import output_errors
from mmsplit.sidecar.partition_reader import OpenPartition
from mmsplit.sidecar.payload_pieces import PayloadPieces
from mmsplit.sidecar.set_manifest import SetManifest
from mmsplit.sidecar.set_reader import open_partition_of_set
from mmsplit.workers import JobStream, WorkerGroup

#: Called from any thread with payload bytes that are known to be in place now.
Add = Callable[[int], None]


def find_partition_fault(
    root: Path, manifest: SetManifest, part_id: int, threads: int, add: Add
) -> MmsplitError | None:
    """Hash all of a partition in `root`; return the first thing that is not as its set says, or None.

    That is what `verify` finds at its level "stored".
    """
    entry = manifest.partitions[part_id]
    try:
        with open_partition_of_set(root, manifest, part_id, "pread") as partition:
            if partition.reader.size_bytes != entry.payload_bytes:
                return IntegrityError(
                    "payload has another size than its set says",
                    path=partition.reader.path,
                    expected=entry.payload_bytes,
                    found=partition.reader.size_bytes,
                )
            pieces = PayloadPieces(partition.index, partition.manifest.data_stop)
            intact = find_intact(pieces, partition.reader.path, threads, add)
            add(entry.payload_bytes - pieces.size_bytes)
            return None if intact.all() else _damage(partition, pieces, int(np.argmin(intact)))
    except (FormatError, IntegrityError, CheckpointError) as error:
        return error


def find_intact(pieces: PayloadPieces, path: Path, threads: int, add: Add) -> NDArray[np.bool_]:
    """Hash what `path` holds; return for each piece whether it is as it was written, and count those that are.

    A piece that cannot be read, because the file ends before it or its disk fails, is not intact.
    """
    intact = np.zeros(len(pieces), np.bool_)
    with output_errors(path):
        reader = FileReader(path, io="pread", changed_error=IntegrityError)

    def make_worker() -> Callable[[int], None]:
        scratch = Scratch()

        def check(number: int) -> None:
            piece = pieces[number]
            if piece.stop > reader.size_bytes:
                return
            try:
                with reader.borrow(piece.start, piece.stop, scratch) as view:
                    intact[number] = pieces.is_intact(piece, view)
            except (CheckpointError, IntegrityError):
                return
            if intact[number]:
                add(piece.size_bytes)

        return check

    with reader, WorkerGroup() as group:
        group.start_many("check", threads, JobStream(iter(range(len(pieces)))), make_worker)
    return intact


def _damage(partition: OpenPartition, pieces: PayloadPieces, number: int) -> IntegrityError:
    piece = pieces[number]
    chunk = pieces.first_damaged(piece, memoryview(partition.reader.read(piece.start, piece.stop)))
    if chunk is None:
        return IntegrityError("padding is not zero", path=partition.reader.path, offset=piece.start)
    return IntegrityError(
        "stored bytes are damaged",
        path=partition.reader.path,
        tensor=pieces.tensor_of(chunk, partition.manifest),
        offset=pieces.chunk_range(chunk)[0],
    )
