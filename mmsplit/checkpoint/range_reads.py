"""Small reads of one file, checked and taken together where they lie close.  Pure but for the reads it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from mmsplit.errors import SourceChangedError

#: Reads the bytes [start, stop) of the file.
Read = Callable[[int, int], bytes]
#: Reads many such ranges, at once if it can, and gives their bytes in the same order.
ReadMany = Callable[[Sequence[tuple[int, int]]], Iterable[bytes]]

#: Two ranges are one read when no more than this lies between them; what lies between is thrown away.
_GAP_BYTES: Final = 4 << 10
_MOST_BYTES: Final = 1 << 20


class RangeReads:
    """Reads half-open byte ranges of a file of `size_bytes` bytes; `path` is for messages."""

    def __init__(self, read: Read, size_bytes: int, path: str, read_many: ReadMany | None = None) -> None:
        self.size_bytes = size_bytes
        self.path = path
        self._read_many = read_many or (lambda ranges: (read(start, stop) for start, stop in ranges))

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes [start, stop), which lie in the file.  Raises `SourceChangedError` if some are missing."""
        return self.read_all([(start, stop)])[0]

    def read_all(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read ranges that lie in the file, in order of their starts.  Raises as `read` does."""
        groups = _group(ranges)
        spans = [(group[0][0], group[-1][1]) for group in groups]
        found = []
        for group, (first, stop), data in zip(groups, spans, self._read_many(spans), strict=True):
            if len(data) != stop - first:
                raise SourceChangedError(
                    "bytes of the file are missing",
                    path=self.path,
                    offset=first,
                    expected=stop - first,
                    found=len(data),
                    hint="Run again when nobody writes to the file.",
                )
            found += [data[start - first : end - first] for start, end in group]
        return found


def _group(ranges: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Put ranges that lie close to each other in one group.  They do not overlap."""
    groups: list[list[tuple[int, int]]] = []
    for start, stop in ranges:
        if groups and start - groups[-1][-1][1] <= _GAP_BYTES and stop - groups[-1][0][0] <= _MOST_BYTES:
            groups[-1].append((start, stop))
        else:
            groups.append([(start, stop)])
    return groups
