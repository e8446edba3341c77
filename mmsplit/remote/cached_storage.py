"""A checkpoint on the Hub whose shards go through the Hub cache: each is read as soon as it is there as a whole."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from mmsplit.checkpoint import FileReader, Identity, IoMode, ReaderPool
from mmsplit.errors import SourceChangedError
from mmsplit.regular_files import read_regular
from mmsplit.remote.disk import require_space
from mmsplit.remote.downloader import Downloader, Found, Presence
from mmsplit.remote.hub_cache import HubCache
from mmsplit.remote.hub_storage import HubStorage
from mmsplit.remote.remote_file import DEFAULT_CONNECTIONS
from mmsplit.remote.repository import HubRepository
from mmsplit.workers import Stopped, WorkerGroup

#: So far ahead is said which shards are needed next: whole shards are fetched, and they are large.
_READ_AHEAD_BYTES: Final = 32 << 30
#: Files fetched at once; more would only finish later, each of them.
_MOST_FILES: Final = 4


class CachedHubStorage(HubStorage):
    """A repository whose shards are downloaded to the cache, where they stay, in the order in which they are needed."""

    def __init__(
        self, repository: HubRepository, cache_dir: str | Path | None, connections: int = DEFAULT_CONNECTIONS
    ) -> None:
        super().__init__(repository, connections)
        self._downloader = Downloader(repository, HubCache(repository, cache_dir))

    def read_file(self, name: str) -> bytes:
        """Read a small file from the cache; it is fetched if it is not there."""
        return read_regular(self._downloader.fetch(name).path)

    def open_readers(self, io: IoMode, identities: Mapping[str, Identity]) -> CachedReaders:  # type: ignore[override]
        """Return readers of the cached files; what is announced is fetched beforehand."""
        return CachedReaders(self._downloader, min(self._connections, _MOST_FILES), io, identities)


class CachedReaders:
    """Lends readers of cached shards, and fetches those that are not there yet.  Implements `ShardReaders`."""

    def __init__(
        self, downloader: Downloader, files_at_once: int, io: IoMode, identities: Mapping[str, Identity]
    ) -> None:
        self._downloader = downloader
        self._files_at_once = files_at_once
        self._io = io
        self._identities = identities
        self._changed = threading.Condition()
        self._waiting: deque[str] = deque()
        self._asked: set[str] = set()
        self._paths: dict[str, Path] = {}
        self._group: WorkerGroup | None = None
        self._cancelled = False
        self._pool = ReaderPool(self._open)

    @property
    def read_ahead_bytes(self) -> int:
        """Several shards."""
        return _READ_AHEAD_BYTES

    def announce(self, shard: str, start: int, stop: int) -> None:  # noqa: ARG002
        """Fetch the shard when its turn comes, unless it is there."""
        with self._changed:
            if shard in self._asked:
                return
            self._asked.add(shard)
            self._waiting.append(shard)
            starts = self._group is None
            if self._group is None:
                self._group = WorkerGroup(self.cancel)
            self._changed.notify_all()
        if starts:  # without the lock: if a thread cannot be had, those that run need it to end
            for number in range(self._files_at_once):
                self._group.start(f"download-{number}", self._fetch_all)

    def lend(self, shard: str) -> AbstractContextManager[FileReader]:
        """Lend the reader of a shard as soon as it has arrived."""
        return self._pool.lend(shard)

    def cancel(self) -> None:
        """Wake everybody who waits for a shard, and let downloads end; what arrived is kept."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the downloads and close the files."""
        self.cancel()
        if self._group is not None:
            try:
                self._group.join()
            except Exception:
                pass  # raised where somebody waited for the shard; if nobody did, nobody needs it
        self._pool.close()

    def __enter__(self) -> CachedReaders:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _go_on(self) -> None:
        if self._cancelled:
            raise Stopped

    def _fetch_all(self) -> None:
        for shard in self._shards():
            found = self._downloader.look(shard, go_on=self._go_on)
            require_space(self._downloader.place.root, _missing_bytes(found))
            fetched = self._downloader.fetch(shard, go_on=self._go_on, found=found)
            with self._changed:
                self._paths[shard] = fetched.path
                self._changed.notify_all()

    def _shards(self) -> Iterator[str]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._cancelled)
                self._go_on()
                shard = self._waiting.popleft()
            yield shard

    def _open(self, shard: str) -> FileReader:
        self.announce(shard, 0, 0)
        with self._changed:
            self._changed.wait_for(lambda: shard in self._paths or self._cancelled)
            if shard not in self._paths:
                error = None if self._group is None else self._group.error
                raise error or Stopped
        reader = FileReader(self._paths[shard], io=self._io)
        if reader.size_bytes != self._identities[shard][0]:
            reader.close()
            raise SourceChangedError(
                "file in the Hub cache changed while it was needed",
                path=self._paths[shard],
                expected=self._identities[shard][0],
                found=reader.size_bytes,
            )
        return reader


def _missing_bytes(found: Found) -> int:
    return 0 if found.presence is Presence.PRESENT else found.file.size_bytes - found.resumable_bytes
