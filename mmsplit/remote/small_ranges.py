"""Small ranges of files at one commit, kept as they arrived: what was read to understand a shard is asked for once.

A PyTorch file has bytes that are no tensor's before each storage.  They are looked at to find the storage, and kept
with the partitions when the file is split; between the two is little more than a zip entry's padding.  So a little is
read around each small range, which costs nothing beside the request itself.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from typing import Final

from mmsplit.remote.remote_file import RemoteFile

#: Longer than an entry's own header with its padding, and than what stands behind the data of the entry before it.
_AROUND_BYTES: Final = 256
#: Ranges that were put together (`checkpoint.range_reads`) are no longer than this.
_MOST_BYTES: Final = 1 << 20


class SmallRanges:
    """Reads ranges through what it keeps of them, `budget_bytes` in all; safe to share between threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._left_bytes = budget_bytes
        self._lock = threading.Lock()
        self._starts: dict[str, list[int]] = {}
        self._spans: dict[str, list[bytes]] = {}

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a file."""
        found = self._find(file.name, start, stop)
        if found is not None:
            return found
        if stop - start > _MOST_BYTES:
            return file.read(start, stop)
        first = max(0, start - _AROUND_BYTES)
        data = file.read(first, min(file.size_bytes, stop + _AROUND_BYTES))
        self._keep(file.name, first, data)
        return data[start - first : stop - first]

    def _find(self, name: str, start: int, stop: int) -> bytes | None:
        with self._lock:
            starts = self._starts.get(name, [])
            position = bisect_right(starts, start) - 1
            if position < 0:
                return None
            first, span = starts[position], self._spans[name][position]
        return span[start - first : stop - first] if stop <= first + len(span) else None

    def _keep(self, name: str, start: int, data: bytes) -> None:
        with self._lock:
            if len(data) <= self._left_bytes:
                self._left_bytes -= len(data)
                starts = self._starts.setdefault(name, [])
                position = bisect_right(starts, start)
                starts.insert(position, start)
                self._spans.setdefault(name, []).insert(position, data)
