"""A checkpoint in a repository on the Hub, read by ranges: nothing is kept on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Final

from mmsplit.checkpoint import Identity, IoMode, RangeReader, Scratch
from mmsplit.errors import IntegrityError
from mmsplit.remote.content_hash import ContentHash
from mmsplit.remote.range_fetcher import RangeFetcher
from mmsplit.remote.remote_file import DEFAULT_CONNECTIONS, RemoteFile
from mmsplit.remote.repository import HubRepository
from mmsplit.remote.small_ranges import SmallRanges
from mmsplit.remote.transfer_log import TrafficSnapshot
from mmsplit.workers import JobStream, WorkerGroup

#: Asked for where nothing says how long a header is; most are shorter.
_HEADER_GUESS_BYTES: Final = 64 << 10
#: Per tensor of a header beside its name: `:{"dtype":"BF16","shape":[4096,14336],"data_offsets":[0,117440512]},`
_ENTRY_BYTES: Final = 112
_METADATA_BYTES: Final = 1024
_MOST_GUESSED_BYTES: Final = 8 << 20
_MAX_FILE_BYTES: Final = 512 << 20
#: Small files up to this much in all are kept, so that none is fetched twice.
_KEPT_BYTES: Final = 64 << 20
#: The same for small ranges of shards.
_KEPT_RANGES_BYTES: Final = 32 << 20
#: What model cards show; no model needs it.
_MEDIA_SUFFIXES: Final = frozenset(
    f".{suffix}"
    for suffix in (
        *("png", "jpg", "jpeg", "gif", "webp", "svg", "bmp", "ico", "pdf"),
        *("mp4", "webm", "mov", "mp3", "wav", "flac", "ogg"),
    )
)


class HubStorage:
    """The files of a repository at one commit.  Implements `mmsplit.checkpoint.Storage`."""

    def __init__(self, repository: HubRepository, connections: int = DEFAULT_CONNECTIONS) -> None:
        self.repository = repository
        self._connections = connections
        self._lock = threading.Lock()
        self._heads: dict[str, bytes] = {}
        self._ranges = SmallRanges(_KEPT_RANGES_BYTES)
        self._kept: dict[str, bytes] = {}
        self._kept_bytes = 0

    @property
    def location(self) -> str:
        """Repository and revision."""
        return f"hf://{self.repository.repo_id}@{self.repository.revision or self.repository.commit[:12]}"

    @property
    def model(self) -> tuple[str, str | None]:
        """Repository id and commit."""
        return self.repository.repo_id, self.repository.commit

    @property
    def directory(self) -> None:
        """Not on this machine."""

    @property
    def moved_bytes(self) -> int:
        """Bytes received so far."""
        return self.traffic.received_bytes

    @property
    def traffic(self) -> TrafficSnapshot:
        """What moved so far."""
        return self.repository.traffic.snapshot()

    def location_of(self, name: str) -> str:
        """Repository, revision and file."""
        return f"{self.location}/{name}"

    def names(self) -> list[str]:
        """Sorted names of the files at the top of the repository."""
        return sorted(file.name for file in self.repository.files if "/" not in file.name and file.name[0] != ".")

    def walk(self, deep: bool, notes: list[str]) -> Iterator[tuple[str, int | None]]:  # noqa: ARG002
        """Yield name and length of every file, in the order of a directory: files first, then folder by folder."""
        for file in sorted(self.repository.files, key=lambda file: _in_order_of_a_walk(file.name)):
            path = PurePosixPath(file.name)
            hidden = any(part.startswith(".") for part in path.parts)
            if not hidden and (deep or len(path.parts) == 1) and path.suffix.lower() not in _MEDIA_SUFFIXES:
                yield file.name, file.size_bytes

    def file_bytes(self, name: str) -> int | None:
        """Length of a file, or None."""
        return self.repository.file(name).size_bytes if name in self.repository else None

    def read_file(self, name: str) -> bytes:
        """Fetch a small file, once."""
        with self._lock:
            if name in self._kept:
                return self._kept[name]
        data = self._fetch_file(name)
        with self._lock:
            if self._kept_bytes + len(data) <= _KEPT_BYTES and name not in self._kept:
                self._kept[name] = data
                self._kept_bytes += len(data)
        return data

    def _fetch_file(self, name: str) -> bytes:
        """Fetch a file, once more if it arrives other than the Hub lists it."""
        file, found = self.repository.file(name), ""
        for _ in range(2):
            data = self.repository.read_file(name, _MAX_FILE_BYTES)
            content = ContentHash(file)
            content.update(data)
            found = content.etag()
            if found == file.etag:
                return data
        raise IntegrityError(
            "what arrived is not what the Hub has, twice",
            path=self.location_of(name),
            expected=file.etag,
            found=found,
            hint="Suspect a proxy in between; run again later.",
        )

    def identity_of(self, name: str) -> Identity:
        """Length, and what the Hub calls the content."""
        file = self.repository.file(name)
        return file.size_bytes, file.etag

    def require_unchanged(self, identities: Mapping[str, Identity]) -> None:
        """A commit does not change; each answer was held to it."""

    def open_shard(self, name: str, io: IoMode, identity: Identity | None = None) -> RangeReader:  # noqa: ARG002
        """Open a shard to read single ranges of it."""
        file = self.repository.open_file(name)
        return _HubReader(file, self._heads.get(name, b""), self._ranges, None, self._connections)

    def open_readers(self, io: IoMode, identities: Mapping[str, Identity]) -> HubReaders:  # noqa: ARG002
        """Return readers that fetch ahead what is announced."""
        return HubReaders(self.repository.open_file, self._heads, self._ranges, self._connections)

    def published_sha256(self, name: str) -> str | None:
        """The SHA-256 in the Hub's listing; files outside large-file storage have none."""
        return self.repository.file(name).sha256

    def fetch_heads(self, shards: tuple[str, ...], weight_map: Mapping[str, str] | None) -> None:
        """Fetch the beginning of each shard, several at once: as much as its header is likely to have."""
        guesses = _guess_header_bytes(shards, weight_map or {})
        jobs = JobStream(iter(shards))

        def fetch(name: str) -> None:
            stop = min(guesses[name], self.repository.file(name).size_bytes)
            self._heads[name] = self.repository.open_file(name).read(0, stop, group.go_on)

        with WorkerGroup() as group:
            group.start_many("header", min(self._connections, len(shards)), jobs, lambda: fetch)


class HubReaders:
    """Readers of files elsewhere, such as a repository's shards, that share one `RangeFetcher`."""

    def __init__(
        self,
        open_file: Callable[[str], RemoteFile],
        heads: Mapping[str, bytes],
        ranges: SmallRanges,
        connections: int,
    ) -> None:
        self._open_file = open_file
        self._heads = heads
        self._ranges = ranges
        self._connections = connections
        self._fetcher = RangeFetcher(open_file, connections)

    @property
    def read_ahead_bytes(self) -> int:
        """As much as keeps all connections busy."""
        return self._fetcher.read_ahead_bytes

    def announce(self, shard: str, start: int, stop: int) -> None:
        """Fetch [start, stop) of a shard when its turn comes."""
        if start < stop:
            self._fetcher.announce(shard, start, stop)

    @contextmanager
    def lend(self, shard: str) -> Iterator[RangeReader]:
        """Lend a reader; nothing is requested for this."""
        head = self._heads.get(shard, b"")
        yield _HubReader(self._open_file(shard), head, self._ranges, self._fetcher, self._connections)

    def cancel(self) -> None:
        """Wake everybody who waits for bytes."""
        self._fetcher.cancel()

    def close(self) -> None:
        """End all connections."""
        self._fetcher.__exit__()

    def __enter__(self) -> HubReaders:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _HubReader:
    """Ranges of one shard: from what was fetched ahead, else by a request of their own."""

    def __init__(
        self, file: RemoteFile, head: bytes, ranges: SmallRanges, fetcher: RangeFetcher | None, connections: int
    ) -> None:
        self._file = file
        self._head = head
        self._ranges = ranges
        self._fetcher = fetcher
        self._connections = connections

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes

    @contextmanager
    def borrow(self, start: int, stop: int, scratch: Scratch) -> Iterator[memoryview]:
        if self._fetcher is not None and self._fetcher.is_announced(self._file.name, start, stop):
            with self._fetcher.borrow(self._file.name, start, stop) as view:
                yield view
            return
        view = scratch.take(stop - start)
        self._file.read_into(start, view)
        yield view.toreadonly()

    def read(self, start: int, stop: int) -> bytes:
        if stop <= len(self._head):
            return self._head[start:stop]
        return self._ranges.read(self._file, start, stop)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        found: dict[tuple[int, int], bytes] = {}
        jobs = JobStream(iter(ranges))

        def fetch(wanted: tuple[int, int]) -> None:
            found[wanted] = self.read(*wanted)

        with WorkerGroup() as group:
            group.start_many("range", min(self._connections, len(ranges)), jobs, lambda: fetch)
        return [found[wanted] for wanted in ranges]

    def close(self) -> None:
        pass


def _in_order_of_a_walk(name: str) -> tuple[tuple[int, str], ...]:
    *folders, last = name.split("/")
    return (*((1, folder) for folder in folders), (0, last))


def _guess_header_bytes(shards: tuple[str, ...], weight_map: Mapping[str, str]) -> dict[str, int]:
    """Return how much of each shard to ask for: enough for its header, judged by the names that the index lists."""
    guesses = dict.fromkeys(shards, 0)
    for tensor, shard in weight_map.items():
        if shard in guesses:
            guesses[shard] += len(tensor.encode()) + _ENTRY_BYTES
    return {
        shard: min(size + size // 8 + _METADATA_BYTES, _MOST_GUESSED_BYTES) if size else _HEADER_GUESS_BYTES
        for shard, size in guesses.items()
    }
