"""What lies where in `partition_K.parity`.  Pure; the numbers are those of PARITY.md.

A payload is seen as k columns of equal length, one after the other, each of S blocks.  Stripe s is block s of every
column, and m parity blocks.  So blocks that lie beside each other are in different stripes, and a stretch of the
payload that is lost takes at most m blocks of each stripe as long as it is no longer than m columns.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsplit.codec.erasure import MOST_BLOCKS
from mmsplit.errors import FormatError, RequestError

PARITY_MAGIC: Final = b"MMSPPAR\0"
PARITY_VERSION: Final = 1
PARITY_SUFFIX: Final = ".parity"
#: Headers and pages of the table of checksums are so long, and everything begins on a multiple of it.
PAGE_BYTES: Final = 4096
PAGE_ENTRIES: Final = PAGE_BYTES // 8 - 1
LEAST_PERCENT: Final = 0.5
MOST_PERCENT: Final = 50.0
#: Where nobody says otherwise.
DEFAULT_PERCENT: Final = 2.0

_LEAST_BLOCK_BYTES: Final = 4096
_MOST_BLOCK_BYTES: Final = 65536
#: Blocks are made larger until there are no more than this, or they are as large as they get.
_BLOCKS_WISHED: Final = 65536
#: Data blocks of a stripe, where the share of parity allows that many.
_MOST_DATA: Final = 200
_HEADER: Final = struct.Struct("<8sIIIHHQII32s")
_CHECKSUM: Final = struct.Struct("<Q")
_LARGEST_PAYLOAD: Final = 1 << 60

Checksums = NDArray[np.uint64]


class ParityLayout(NamedTuple):
    """How a payload of `payload_bytes` is cut: `data_count` columns (k) of `stripe_count` blocks (S), `parity_count` m.

    `percent_hundredths` is what was asked for: 200 for 2 %.
    """

    payload_bytes: int
    percent_hundredths: int
    block_bytes: int
    data_count: int
    parity_count: int

    @property
    def percent(self) -> float:
        """The share that was asked for."""
        return self.percent_hundredths / 100

    @property
    def block_count(self) -> int:
        """Blocks of the payload, the last perhaps a shorter one."""
        return -(-self.payload_bytes // self.block_bytes)

    @property
    def stripe_count(self) -> int:
        """Stripes, and so blocks of a column."""
        return -(-self.block_count // self.data_count)

    @property
    def parity_blocks(self) -> int:
        """Parity blocks of all stripes."""
        return self.stripe_count * self.parity_count

    @property
    def table_pages(self) -> int:
        """Pages of one copy of the table: checksums of the payload's blocks, then of the parity blocks."""
        return -(-(self.block_count + self.parity_blocks) // PAGE_ENTRIES)

    @property
    def table_starts(self) -> tuple[int, int]:
        """Where the table begins, and where its copy does."""
        return PAGE_BYTES, self.parity_start + self.parity_blocks * self.block_bytes

    @property
    def parity_start(self) -> int:
        """Where the first parity column begins; each has `stripe_count` blocks, and the next follows it."""
        return PAGE_BYTES * (1 + self.table_pages)

    @property
    def header_starts(self) -> tuple[int, int]:
        """Where the header begins, and where its copy does, which ends the file."""
        return 0, self.file_bytes - PAGE_BYTES

    @property
    def file_bytes(self) -> int:
        """Length of the parity file."""
        return 2 * PAGE_BYTES * (1 + self.table_pages) + self.parity_blocks * self.block_bytes

    @property
    def longest_loss_bytes(self) -> int:
        """However it lies, one stretch of so many bytes of the payload can be made again while the parity is sound."""
        return min(self.payload_bytes, (self.parity_count * self.stripe_count - 1) * self.block_bytes + 1)


class ParityHeader(NamedTuple):
    """What a parity file says of itself: which payload it is of, by the SHA-256 of the manifest in it, and how cut."""

    part_id: int
    manifest_sha256: str
    layout: ParityLayout


def parity_name(part_id: int) -> str:
    """Return the name of a partition's parity file."""
    return f"partition_{part_id}{PARITY_SUFFIX}"


def percent_hundredths(percent: float) -> int:
    """Return a share of parity in hundredths of a percent.  Raises `RequestError` for a share that is none."""
    if LEAST_PERCENT <= percent <= MOST_PERCENT:
        hundredths = round(percent * 100)
        if abs(hundredths - percent * 100) < 1e-6:
            return hundredths
    raise RequestError(
        f"no such share of parity: {percent!r} %",
        hint=f"Give {LEAST_PERCENT} to {MOST_PERCENT:g} percent, with at most two decimals.",
    )


def plan_parity(payload_bytes: int, percent: float) -> ParityLayout:
    """Choose the layout for a payload and a share of parity.  Raises `RequestError` for a share that is none."""
    hundredths = percent_hundredths(percent)
    block_bytes = _LEAST_BLOCK_BYTES
    while payload_bytes > _BLOCKS_WISHED * block_bytes and block_bytes < _MOST_BLOCK_BYTES:
        block_bytes *= 2
    block_count = -(-payload_bytes // block_bytes)
    most_data = min(_MOST_DATA, MOST_BLOCKS * 10_000 // (10_000 + hundredths))
    stripe_count = -(-block_count // most_data)
    data_count = -(-block_count // stripe_count)
    return ParityLayout(payload_bytes, hundredths, block_bytes, data_count, -(-data_count * hundredths // 10_000))


def pack_parity_header(header: ParityHeader) -> bytes:
    """Return the first, and the last, page of a parity file."""
    layout = header.layout
    fields = _HEADER.pack(
        PARITY_MAGIC,
        PARITY_VERSION,
        header.part_id,
        layout.block_bytes,
        layout.data_count,
        layout.parity_count,
        layout.payload_bytes,
        layout.percent_hundredths,
        0,
        bytes.fromhex(header.manifest_sha256.removeprefix("sha256:")),
    )
    return (fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))).ljust(PAGE_BYTES, b"\0")


def parse_parity_header(page: bytes, file_bytes: int, path: str) -> ParityHeader | None:
    """Return the header, None if the page is not a sound one of a file of that length.

    The length decides what the numbers may be: nothing is allocated on the word of a header.  Raises `FormatError`
    for a version not known here.
    """
    fields, checksum = page[: _HEADER.size], page[_HEADER.size : _HEADER.size + _CHECKSUM.size]
    if len(page) != PAGE_BYTES or _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields)) != checksum:
        return None
    magic, version, part_id, block_bytes, data, parity, payload_bytes, hundredths, reserved, sha256 = _HEADER.unpack(
        fields
    )
    if magic != PARITY_MAGIC:
        return None
    if version != PARITY_VERSION:
        raise FormatError(
            "parity file is of a version not known here",
            path=path,
            expected=f"version {PARITY_VERSION}",
            found=version,
            hint="Use a newer mmsplit, or make the parity again.",
        )
    layout = ParityLayout(payload_bytes, hundredths, block_bytes, data, parity)
    is_sound = (
        reserved == 0
        and data >= 1
        and parity >= 1
        and data + parity <= MOST_BLOCKS
        and _LEAST_BLOCK_BYTES <= block_bytes <= _MOST_BLOCK_BYTES
        and block_bytes & (block_bytes - 1) == 0
        and 0 < payload_bytes <= _LARGEST_PAYLOAD
        and LEAST_PERCENT * 100 <= hundredths <= MOST_PERCENT * 100
        and layout.file_bytes == file_bytes
        and not any(page[_HEADER.size + _CHECKSUM.size :])
    )
    return ParityHeader(part_id, f"sha256:{sha256.hex()}", layout) if is_sound else None


def pack_table(checksums: Checksums) -> bytes:
    """Return the pages of the table.  A page ends in its own checksum, seeded with its number."""
    pages = []
    for number, first in enumerate(range(0, len(checksums), PAGE_ENTRIES)):
        entries = checksums[first : first + PAGE_ENTRIES].astype("<u8").tobytes().ljust(8 * PAGE_ENTRIES, b"\0")
        pages.append(entries + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(entries, seed=number)))
    return b"".join(pages)


def parse_table_page(page: bytes, number: int) -> Checksums | None:
    """Return the entries of a page, None if it is not the sound page of that number."""
    if len(page) != PAGE_BYTES or page[-8:] != _CHECKSUM.pack(xxhash.xxh3_64_intdigest(page[:-8], seed=number)):
        return None
    return np.frombuffer(page, "<u8", PAGE_ENTRIES)
