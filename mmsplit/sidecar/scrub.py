"""Which part of a set a check of tonight looks at.  Pure.

A set is seen as one stretch of bytes: its payloads one after the other, each as long as the set manifest says.  A chunk
belongs to the place where it begins.  So every chunk is in exactly one of n equal stretches, always the same one,
n stretches hold the same bytes to within a chunk, and each is read from the disk in one go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

from mmsplit.errors import RequestError
from mmsplit.sidecar.chunk_check import Wanted
from mmsplit.sidecar.chunk_index import ChunkIndex

_SUBSET: Final = re.compile(r"([1-9]\d{0,8})/([1-9]\d{0,8})", re.ASCII)


class Stretch(NamedTuple):
    """Places [`start`, `stop`) of a set."""

    start: int
    stop: int


class Subset(NamedTuple):
    """One of `parts` equal parts of a set, `number` counted from 1."""

    number: int
    parts: int

    def __str__(self) -> str:
        return f"{self.number}/{self.parts}"

    def stretch_of(self, total_bytes: int) -> Stretch:
        """Return its places in a set of that length."""
        return Stretch(-(-total_bytes * (self.number - 1) // self.parts), -(-total_bytes * self.number // self.parts))


def parse_subset(text: str) -> Subset:
    """Parse `3/7`: the third of seven.  Raises `RequestError`."""
    match = _SUBSET.fullmatch(text)
    if match is None or int(match[1]) > int(match[2]):
        raise RequestError("not a subset", found=repr(text[:40]), hint="Write 3/7 for the third of seven parts.")
    return Subset(int(match[1]), int(match[2]))


def without(wanted: Stretch, covered: Iterable[Stretch]) -> tuple[Stretch, ...]:
    """Return what is left of `wanted` when all places of `covered` are taken out, in order."""
    left, position = [], wanted.start
    for start, stop in sorted(covered):
        if start > position:
            left.append(Stretch(position, min(start, wanted.stop)))
        position = max(position, stop)
        if position >= wanted.stop:
            break
    left.append(Stretch(position, wanted.stop))
    return tuple(stretch for stretch in left if stretch.start < stretch.stop)


def chunks_within(index: ChunkIndex, payload_start: int, stretches: Sequence[Stretch]) -> Wanted:
    """Flag the chunks that begin within the stretches; the payload begins at place `payload_start` of the set."""
    places = index["stored_offset"].astype(np.int64) + payload_start
    wanted = np.zeros(len(index), np.bool_)
    for start, stop in stretches:
        wanted |= (places >= start) & (places < stop)
    return wanted
