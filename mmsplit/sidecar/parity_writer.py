"""Makes the parity file of a payload: read in bands of stripes by a few threads, complete before it has its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from mmsplit.checkpoint import FileReader
from mmsplit.codec.erasure import StripeCode
from mmsplit.digests import sha256_of
from mmsplit.errors import IntegrityError, NoSpaceError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.chunk_check import check_chunks
from mmsplit.sidecar.output_directory import free_bytes
from mmsplit.sidecar.output_files import output_errors, partial_path, sync_directory
from mmsplit.sidecar.parity_file import ParityFile, find_parity_faults
from mmsplit.sidecar.parity_layout import (
    Checksums,
    ParityHeader,
    ParityLayout,
    pack_parity_header,
    pack_table,
    parity_name,
    plan_parity,
)
from mmsplit.sidecar.parity_stripes import Band, StripeBuffer, iter_bands, payload_bytes_in
from mmsplit.sidecar.partition_reader import Fault, OpenPartition, open_partition_files
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.workers import JobStream, ProgressCallback, ProgressCounter, WorkerGroup

#: Encoding holds the GIL, so that more threads than these, which read and hash meanwhile, bring nothing but buffers.
_MOST_THREADS: Final = 3


def parity_counter(payloads: Iterable[Path], progress: ProgressCallback | None) -> ProgressCounter:
    """Return what counts the making of parity for these payloads: each is read twice, to verify and to encode it."""
    return ProgressCounter("parity", 2 * sum(path.stat().st_size for path in payloads if path.is_file()), progress)


def make_parity(manifest_path: Path, percent: float, threads: int, counter: ProgressCounter) -> ParityLayout:
    """Make the parity file of the partition whose manifest is at `manifest_path`, in place of one that is there.

    The payload is verified first, to the last byte: parity would keep its damage for ever.  Memory is bounded by the
    bands, and 8 bytes for each block.  Raises `IntegrityError` for a payload that is not sound, `OutputError`,
    `RequestError` for no such percentage, `MissingExtraError`.
    """
    with open_partition_files(manifest_path, "pread") as partition:
        layout = plan_parity(partition.reader.size_bytes, percent)
        code = StripeCode(layout.data_count, layout.parity_count)  # says at once if it cannot be had
        _require_sound(partition, threads, counter)
        part_id = partition.manifest.part_id
        path = manifest_path.with_name(parity_name(part_id))
        _require_space(path, layout)
        partial = partial_path(path)
        with output_errors(partial):
            partial.unlink(missing_ok=True)
        out = PayloadFile(partial, direct=False)
        try:
            run = _ParityRun(layout, code, partition.reader, out)
            run.execute(ParityHeader(part_id, manifest_digest(manifest_path), layout), threads, counter)
        finally:
            out.close()
        partition.reader.require_unchanged()
    with output_errors(path):
        os.replace(partial, path)
    sync_directory(path.parent)
    return layout


def ensure_parity(
    manifest_path: Path, percent: float, threads: int, counter: ProgressCounter
) -> tuple[ParityLayout, bool]:
    """Make the parity file unless it is there, sound, of this payload, and of this percentage.

    Returns its layout, and whether it was made.  Raises as `make_parity` does.
    """
    with open_partition_files(manifest_path, "pread") as partition:
        part_id, layout = partition.manifest.part_id, plan_parity(partition.reader.size_bytes, percent)
    path = manifest_path.with_name(parity_name(part_id))
    if path.is_file() and not find_parity_faults(path, part_id, manifest_digest(manifest_path), look=True):
        with ParityFile(path) as there:
            if there.layout == layout:
                counter.add(2 * layout.payload_bytes)
                return layout, False
    return make_parity(manifest_path, percent, threads, counter), True


def manifest_digest(manifest_path: Path) -> str:
    """Return the SHA-256 of a manifest, which says what payload a parity file is of."""
    with output_errors(manifest_path):
        return sha256_of(read_regular(manifest_path))


class _ParityRun:
    """Encodes one payload into one file under construction."""

    def __init__(self, layout: ParityLayout, code: StripeCode, reader: FileReader, out: PayloadFile) -> None:
        self._layout = layout
        self._code = code
        self._reader = reader
        self._out = out
        self._data: Checksums = np.zeros((layout.data_count, layout.stripe_count), np.uint64)
        self._parity: Checksums = np.zeros((layout.parity_count, layout.stripe_count), np.uint64)

    def execute(self, header: ParityHeader, threads: int, counter: ProgressCounter) -> None:
        """Write the whole file, and sync it."""
        layout = self._layout
        with WorkerGroup() as group:

            def make_worker() -> Callable[[Band], None]:
                buffer = StripeBuffer(layout)

                def work(band: Band) -> None:
                    self._encode(band, buffer)
                    counter.add(payload_bytes_in(band, layout))

                return work

            group.start_many("parity", min(threads, _MOST_THREADS), JobStream(iter_bands(layout)), make_worker)
        checksums = np.concatenate((self._data.ravel()[: layout.block_count], self._parity.ravel()))
        table = pack_table(checksums)
        for start in layout.table_starts:
            self._out.write(start, table)
        for start in layout.header_starts:
            self._out.write(start, pack_parity_header(header))
        self._out.finish(layout.file_bytes)

    def _encode(self, band: Band, buffer: StripeBuffer) -> None:
        layout, size = self._layout, self._layout.block_bytes
        if not buffer.read(self._reader, band).all():
            raise IntegrityError("payload cannot be read", path=self._reader.path)
        self._data[:, band.start : band.stop] = buffer.checksums()
        parity = buffer.encode(self._code)
        for column in range(layout.parity_count):
            view = memoryview(parity[column])
            for stripe in range(band.stop - band.start):
                block = view[stripe * size : (stripe + 1) * size]
                self._parity[column, band.start + stripe] = xxhash.xxh3_64_intdigest(block)
            self._out.write(layout.parity_start + (column * layout.stripe_count + band.start) * size, view)


def _require_sound(partition: OpenPartition, threads: int, counter: ProgressCounter) -> None:
    """Raise `IntegrityError` with the first of what is wrong with the payload's data, if anything is."""
    faults: list[Fault] = []
    slots = check_chunks(partition, threads, faults.append, counter, decode=False)
    counter.add(partition.reader.size_bytes - slots)  # header, index and copy were read at opening
    if faults:
        first = min(faults, key=lambda fault: fault.start or 0)
        raise IntegrityError(
            f"no parity is made of a damaged payload: {first.what}",
            path=first.file,
            tensor=first.tensor,
            offset=first.start,
            hint="Repair it first: mmsplit repair SET --from SOURCE.",
        )


def _require_space(path: Path, layout: ParityLayout) -> None:
    free = free_bytes(path.parent)
    if free < layout.file_bytes:
        raise NoSpaceError(
            "too little free space for the parity file",
            path=path,
            expected=f"{layout.file_bytes:,} bytes free",
            found=free,
            hint=f"Free {layout.file_bytes - free:,} bytes more, or give a smaller percentage.",
        )
