"""Ranges that cover a file, each byte once.  Pure."""

from __future__ import annotations

from collections.abc import Iterable

from mmsplit.checkpoint.tensor import ByteRange


def first_byte_not_covered_once(ranges: Iterable[ByteRange], size_bytes: int) -> int | None:
    """Return the first byte of a file that is in no range, or in two; None if there is none."""
    position = 0
    for start, stop in sorted(ranges):
        if start == stop:
            continue
        if start != position:
            return min(start, position)
        position = stop
    return None if position == size_bytes else min(position, size_bytes)


def gaps_between(ranges: Iterable[ByteRange], size_bytes: int) -> list[ByteRange]:
    """Return what `ranges` leave of a file of `size_bytes`, in order.  Overlaps are not looked for."""
    gaps = []
    position = 0
    for start, stop in sorted([*ranges, (size_bytes, size_bytes)]):
        if start > position:
            gaps.append((position, start))
        position = max(position, stop)
    return gaps
