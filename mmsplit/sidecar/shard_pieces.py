"""A source shard as it is put together again: kept bytes and stored tensors, in the order of the file.  Pure.

The kept bytes of a shard are those that no tensor covers; they need no list of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from mmsplit.checkpoint.cover import first_byte_not_covered_once, gaps_between
from mmsplit.checkpoint.tensor import ByteRange
from mmsplit.errors import IntegrityError

T = TypeVar("T")


class KeptPiece(NamedTuple):
    """Bytes of a shard that are kept as they are; `data` begins at byte `start` of the shard."""

    start: int
    data: memoryview


def arrange_shard(
    stored: Sequence[tuple[ByteRange, T]], kept: bytes, size_bytes: int, path: str
) -> list[KeptPiece | T]:
    """Put kept bytes between what is stored of a shard, each with its range; what has no bytes is left out.

    Raises `IntegrityError` unless all together cover each byte of the shard once.
    """
    ranges = [place for place, _ in stored]
    gaps = gaps_between(ranges, size_bytes)
    gap_bytes = sum(stop - start for start, stop in gaps)
    offset = first_byte_not_covered_once([*ranges, *gaps], size_bytes)
    if offset is not None or gap_bytes != len(kept):
        raise IntegrityError(
            "the partitions do not cover the shard",
            path=path,
            offset=offset,
            expected=f"all but {len(kept):,} bytes, each once",
            found=f"{gap_bytes:,} bytes in no partition" if offset is None else "a byte that is in two tensors",
            hint="The set manifest is not that of these partitions; verify the set.",
        )
    pieces: list[tuple[int, KeptPiece | T]] = [(start, item) for (start, stop), item in stored if start < stop]
    view, position = memoryview(kept), 0
    for start, stop in gaps:
        pieces.append((start, KeptPiece(start, view[position : position + stop - start])))
        position += stop - start
    return [item for _, item in sorted(pieces, key=lambda piece: piece[0])]
