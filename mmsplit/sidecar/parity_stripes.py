"""Some stripes of a payload at a time, in a buffer that does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsplit.checkpoint import FileReader, Scratch
from mmsplit.codec.erasure import StripeCode
from mmsplit.errors import CheckpointError, IntegrityError
from mmsplit.sidecar.parity_layout import ParityLayout

#: The data blocks of the stripes that are worked on at once take no more than this, unless one stripe alone does.
_BAND_BYTES: Final = 32 << 20
#: Of each column so much is read at once, where the band allows: disks read long ranges faster.
_LONGEST_RANGE_BYTES: Final = 1 << 20
#: Encoded at once of every column: what goes into a call and comes out of it stays in the processor's caches.
_PIECE_BYTES: Final = 16 << 10


class Band(NamedTuple):
    """Stripes [`start`, `stop`)."""

    start: int
    stop: int


def stripes_at_once(layout: ParityLayout) -> int:
    """Return how many stripes a band may have."""
    range_bytes = min(_LONGEST_RANGE_BYTES, _BAND_BYTES // layout.data_count)
    return max(1, range_bytes // layout.block_bytes)


def iter_bands(layout: ParityLayout) -> Iterator[Band]:
    """Yield all stripes in bands."""
    step = stripes_at_once(layout)
    for start in range(0, layout.stripe_count, step):
        yield Band(start, min(start + step, layout.stripe_count))


def payload_bytes_in(band: Band, layout: ParityLayout) -> int:
    """Return how many bytes of the payload lie in a band, its end left out where the last blocks are not whole."""
    size, column_bytes = layout.block_bytes, layout.stripe_count * layout.block_bytes
    starts = (column * column_bytes for column in range(layout.data_count))
    ends = ((start + band.start * size, start + band.stop * size) for start in starts)
    return sum(max(0, min(stop, layout.payload_bytes) - start) for start, stop in ends)


class StripeBuffer:
    """Holds the data blocks of one band after the other; one per thread."""

    def __init__(self, layout: ParityLayout) -> None:
        self._layout = layout
        step = min(stripes_at_once(layout), layout.stripe_count)
        self._rows = np.zeros((layout.data_count, step * layout.block_bytes), np.uint8)
        self._scratch = Scratch()
        self._band = Band(0, 0)

    def read(self, reader: FileReader, band: Band) -> NDArray[np.bool_]:
        """Read a band; return for each column and stripe whether the payload has that block.

        What lies behind the end that the payload should have is zeros, and counts as there.
        """
        layout, count = self._layout, band.stop - band.start
        self._band = band
        there = np.ones((layout.data_count, count), np.bool_)
        for column in range(layout.data_count):
            start = (column * layout.stripe_count + band.start) * layout.block_bytes
            row = self._rows[column, : count * layout.block_bytes]
            wanted = max(0, min(len(row), layout.payload_bytes - start))
            row[wanted:] = 0
            got = max(0, min(wanted, reader.size_bytes - start))
            row[got:wanted] = 0
            if not self._read_range(reader, start, row[:got]):
                there[column, : -(-got // layout.block_bytes)] = self._read_blocks(reader, start, row[:got])
            there[column, got // layout.block_bytes : -(-wanted // layout.block_bytes)] &= got == wanted
        return there

    def checksums(self) -> NDArray[np.uint64]:
        """Return the checksum of each block, by column and stripe."""
        size, count = self._layout.block_bytes, self._band.stop - self._band.start
        found = np.empty((self._layout.data_count, count), np.uint64)
        for column in range(self._layout.data_count):
            view = memoryview(self._rows[column])
            for stripe in range(count):
                found[column, stripe] = xxhash.xxh3_64_intdigest(view[stripe * size : (stripe + 1) * size])
        return found

    def encode(self, code: StripeCode) -> NDArray[np.uint8]:
        """Return the parity blocks of the band: by number, those of its stripes one after the other."""
        length = (self._band.stop - self._band.start) * self._layout.block_bytes
        parity = np.empty((self._layout.parity_count, length), np.uint8)
        for start in range(0, length, _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, length)
            for number, block in enumerate(code.encode(self._rows[:, start:stop].tobytes())):
                parity[number, start:stop] = block
        return parity

    def clear(self, column: int, stripe: int) -> None:
        """Put zeros in the place of a block; `stripe` counts in the payload, here and below."""
        start = (stripe - self._band.start) * self._layout.block_bytes
        self._rows[column, start : start + self._layout.block_bytes] = 0

    def block(self, column: int, stripe: int) -> memoryview:
        """Return a block of the band."""
        start = (stripe - self._band.start) * self._layout.block_bytes
        return memoryview(self._rows[column])[start : start + self._layout.block_bytes]

    def _read_range(self, reader: FileReader, start: int, out: NDArray[np.uint8]) -> bool:
        if not len(out):
            return True
        try:
            with reader.borrow(start, start + len(out), self._scratch) as view:
                out[:] = np.frombuffer(view, np.uint8)
        except (CheckpointError, IntegrityError):
            return False
        return True

    def _read_blocks(self, reader: FileReader, start: int, out: NDArray[np.uint8]) -> list[bool]:
        """Read block by block what could not be read as a whole: of a disk that fails, most can be."""
        size = self._layout.block_bytes
        return [
            self._read_range(reader, start + offset, out[offset : offset + size]) for offset in range(0, len(out), size)
        ]
