"""A parity file, read: which payload it is of, what its blocks and the payload's must be, and what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsplit.checkpoint import FileReader, Scratch
from mmsplit.errors import CheckpointError, FormatError, IntegrityError
from mmsplit.sidecar.output_files import refuse_shortage
from mmsplit.sidecar.pace import Pace
from mmsplit.sidecar.parity_layout import (
    PAGE_BYTES,
    PAGE_ENTRIES,
    Checksums,
    ParityHeader,
    parse_parity_header,
    parse_table_page,
)
from mmsplit.sidecar.partition_reader import Fault

#: Blocks that are checked between two looks at the table.
_BLOCKS_AT_ONCE: Final = 64


class ParityFile:
    """A parity file that is open for reading; safe to share between threads.

    Raises `IntegrityError` if neither of its headers is sound, `FormatError` for a version not known here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():  # to open a pipe would wait for ever
            raise IntegrityError("parity file is no file", path=path)
        try:
            self._reader = FileReader(path, io="pread", changed_error=IntegrityError)
        except OSError as error:
            refuse_shortage(error, path)
            raise IntegrityError(f"parity file cannot be read: {error.strerror}", path=path) from error
        try:
            self.header = self._read_header()
        except BaseException:
            self._reader.close()
            raise
        self.layout = self.header.layout

    def checksums(self, first: int, count: int) -> tuple[Checksums, NDArray[np.bool_]]:
        """Return what the table says of `count` blocks, and for each whether that is known.

        They are numbered through: those of the payload, then parity column by parity column.
        """
        values, known = np.zeros(count, np.uint64), np.zeros(count, np.bool_)
        position = first
        while position < first + count:
            page, entry = divmod(position, PAGE_ENTRIES)
            stop = min(first + count, (page + 1) * PAGE_ENTRIES)
            entries = next((found for found in self._pages(page) if found is not None), None)
            if entries is not None:
                values[position - first : stop - first] = entries[entry : entry + stop - position]
                known[position - first : stop - first] = True
            position = stop
        return values, known

    def parity_block(self, column: int, stripe: int, scratch: Scratch) -> bytes | None:
        """Return a parity block; None if it is damaged."""
        layout = self.layout
        number = column * layout.stripe_count + stripe
        expected, known = self.checksums(layout.block_count + number, 1)
        start = layout.parity_start + number * layout.block_bytes
        try:
            with self._reader.borrow(start, start + layout.block_bytes, scratch) as view:
                is_right = bool(known[0]) and xxhash.xxh3_64_intdigest(view) == int(expected[0])
                return bytes(view) if is_right else None
        except (CheckpointError, IntegrityError):
            return None

    def faults(self, *, look: bool, pace: Pace | None = None) -> Iterator[Fault]:
        """Yield what is wrong with the file: headers and tables, and if `look` every parity block."""
        layout = self.layout
        for start in layout.header_starts:
            if self._parse(self._read_page(start)) != self.header:
                yield self._fault("header of the parity file is damaged", start, start + PAGE_BYTES)
        for page in range(layout.table_pages):
            for start, entries in zip(layout.table_starts, self._pages(page), strict=True):
                if entries is None:
                    begin = start + page * PAGE_BYTES
                    yield self._fault("checksums in the parity file are damaged", begin, begin + PAGE_BYTES)
        if not look:
            return
        scratch = Scratch()
        for first in range(0, layout.parity_blocks, _BLOCKS_AT_ONCE):
            count = min(_BLOCKS_AT_ONCE, layout.parity_blocks - first)
            if pace is not None:
                pace.take(count * layout.block_bytes, lambda: None)
            yield from self._damaged_blocks(first, count, scratch)

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def __enter__(self) -> ParityFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _damaged_blocks(self, first: int, count: int, scratch: Scratch) -> Iterator[Fault]:
        size = self.layout.block_bytes
        expected, known = self.checksums(self.layout.block_count + first, count)
        for number in range(count):
            start = self.layout.parity_start + (first + number) * size
            if not known[number]:
                continue  # its page of the table is a fault already
            try:
                with self._reader.borrow(start, start + size, scratch) as view:
                    is_right = xxhash.xxh3_64_intdigest(view) == int(expected[number])
            except (CheckpointError, IntegrityError):
                is_right = False
            if not is_right:
                yield self._fault("parity block is damaged", start, start + size)

    def _read_header(self) -> ParityHeader:
        for start in (0, self._reader.size_bytes - PAGE_BYTES):
            header = self._parse(self._read_page(start))
            if header is not None:
                return header
        raise IntegrityError("parity file has no sound header", path=self.path)

    def _parse(self, page: bytes) -> ParityHeader | None:
        return parse_parity_header(page, self._reader.size_bytes, str(self.path))

    def _pages(self, number: int) -> Iterator[Checksums | None]:
        for start in self.layout.table_starts:
            yield parse_table_page(self._read_page(start + number * PAGE_BYTES), number)

    def _read_page(self, start: int) -> bytes:
        if not 0 <= start <= self._reader.size_bytes - PAGE_BYTES:
            return b""
        try:
            return self._reader.read(start, start + PAGE_BYTES)
        except (CheckpointError, IntegrityError):
            return b""

    def _fault(self, what: str, start: int, stop: int) -> Fault:
        return Fault(str(self.path), what, start, stop, self.header.part_id)


def find_parity_faults(
    path: Path,
    part_id: int,
    manifest_sha256: str | None,
    *,
    look: bool,
    pace: Pace | None = None,
) -> list[Fault]:
    """Return what is wrong with the parity file at `path`, nothing if there is none.

    It must be of the partition whose manifest has that SHA-256; None if nobody knows it.  Without `look` its parity
    blocks are not read.
    """
    if not os.path.lexists(path):
        return []
    try:
        with ParityFile(path) as parity:
            header = parity.header
            if header.part_id != part_id or manifest_sha256 not in (None, header.manifest_sha256):
                what = "parity is of another payload; make it again with mmsplit repair or mmsplit parity"
                return [Fault(str(path), what, partition=part_id)]
            return list(parity.faults(look=look, pace=pace))
    except (IntegrityError, FormatError) as error:
        return [Fault(str(path), error.what, partition=part_id)]
