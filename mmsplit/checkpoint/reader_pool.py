"""Open shards, shared by threads: opened at first use, the least recently used closed when there are many."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from mmsplit.checkpoint.file_reader import FileReader

#: A lease and a file descriptor are held per open shard; thousands of shards must not use up either.
_MAX_OPEN: Final = 32
_READ_AHEAD_BYTES: Final = 64 << 20


class ReaderPool:
    """Lends the readers of a checkpoint's shards by name."""

    def __init__(self, open_shard: Callable[[str], FileReader]) -> None:
        """`open_shard` may take its time: only those who want the same shard wait for it."""
        self._open_shard = open_shard
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}
        self._readers: OrderedDict[str, FileReader] = OrderedDict()
        self._in_use: dict[str, int] = {}

    @property
    def read_ahead_bytes(self) -> int:
        """Enough for a disk to be busy."""
        return _READ_AHEAD_BYTES

    def announce(self, shard: str, start: int, stop: int) -> None:
        """Ask the kernel to start reading [start, stop) of a shard; returns at once."""
        with self.lend(shard) as reader:
            reader.will_need(start, stop)

    @contextmanager
    def lend(self, shard: str) -> Iterator[FileReader]:
        """Lend the reader of a shard until the block ends.  Raises `SourceChangedError` as opening does."""
        with self._lock:
            self._in_use[shard] = self._in_use.get(shard, 0) + 1
            opening = self._opening.setdefault(shard, threading.Lock())
        try:
            with opening:
                with self._lock:
                    reader = self._readers.get(shard)
                if reader is None:
                    reader = self._open_shard(shard)
                with self._lock:
                    self._readers[shard] = reader
                    self._readers.move_to_end(shard)
                    self._close_idle()
            yield reader
        finally:
            with self._lock:
                self._in_use[shard] -= 1

    def cancel(self) -> None:
        """Nobody waits here for longer than a disk takes."""

    def release(self, shard: str) -> None:
        """Close a shard, so that its space is free once it is deleted; it may not be lent out."""
        with self._lock:
            reader = self._readers.pop(shard, None)
        if reader is not None:
            reader.close()

    def close(self) -> None:
        """Close all readers; none may be lent out."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _close_idle(self) -> None:
        for name in [name for name in self._readers if not self._in_use.get(name)]:
            if len(self._readers) <= _MAX_OPEN:
                return
            self._readers.pop(name).close()
