"""Open shards, shared by threads: opened at first use, the least recently used closed when there are many."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from mmsplit.checkpoint.checkpoint import Checkpoint
from mmsplit.checkpoint.file_reader import FileReader, IoMode

#: A lease and a file descriptor are held per open shard; thousands of shards must not use up either.
_MAX_OPEN: Final = 32


class ReaderPool:
    """Lends the readers of a checkpoint's shards by name."""

    def __init__(self, checkpoint: Checkpoint, io: IoMode = "auto") -> None:
        self._checkpoint = checkpoint
        self._io = io
        self._lock = threading.Lock()
        self._readers: OrderedDict[str, FileReader] = OrderedDict()
        self._in_use: dict[str, int] = {}

    @contextmanager
    def lend(self, shard: str) -> Iterator[FileReader]:
        """Lend the reader of a shard until the block ends.  Raises `SourceChangedError` as opening does."""
        with self._lock:
            reader = self._readers.get(shard)
            if reader is None:
                reader = self._readers[shard] = self._checkpoint.open_shard(shard, self._io)
            self._readers.move_to_end(shard)
            self._in_use[shard] = self._in_use.get(shard, 0) + 1
            self._close_idle()
        try:
            yield reader
        finally:
            with self._lock:
                self._in_use[shard] -= 1

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
