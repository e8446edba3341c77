"""How long an encoded chunk is, by what its own bytes say; for who has lost the record of it.  Pure.

The answers are claims, not facts: a checksum, or a decoder, has to confirm them.
"""

from __future__ import annotations

import struct
from typing import Final

import zstandard

from mmsplit.codec.word import WordLayout

_PLANE: Final = struct.Struct("<II")
_LENGTH_BITS: Final = (1 << 31) - 1
_BLOCK_HEADER_BYTES: Final = 3
_RLE: Final = 1
_HAS_CHECKSUM: Final = 4
_CHECKSUM_BYTES: Final = 4


def planes_end(data: memoryview, layout: WordLayout) -> int | None:
    """Return where a planes chunk of this layout ends that begins `data`; None if it cannot be one."""
    prologue = _PLANE.size * layout.word_bytes
    if len(data) < prologue:
        return None
    planes = [_PLANE.unpack_from(data, plane * _PLANE.size) for plane in range(layout.word_bytes)]
    if any(offset < prologue for _, offset in planes):
        return None
    end = max(offset + (length & _LENGTH_BITS) for length, offset in planes)
    return end if end <= len(data) else None


def zstd_end(data: memoryview) -> int | None:
    """Return where the zstd frame ends that begins `data`; None if there is none.  Only block headers are read."""
    try:
        position = zstandard.frame_header_size(data)
    except zstandard.ZstdError:
        return None
    is_last = False
    while not is_last:
        header = int.from_bytes(data[position : position + _BLOCK_HEADER_BYTES], "little")
        is_last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        position += _BLOCK_HEADER_BYTES + (1 if kind == _RLE else size)
        if position > len(data):
            return None
    position += _CHECKSUM_BYTES if data[4] & _HAS_CHECKSUM else 0
    return position if position <= len(data) else None
