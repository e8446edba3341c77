"""What this room asks of the place where a checkpoint lies: a directory (`local_storage`), or a repository of the Hub.

Everything above works on these protocols, so that a model id does wherever a path does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeAlias

from mmsplit.checkpoint.file_reader import IoMode, Scratch

#: What tells one state of a shard from another without reading it: its length in bytes, then whatever else does.
Identity: TypeAlias = tuple[int | str, ...]


class RangeReader(Protocol):
    """Reads half-open byte ranges of one file; safe to share between threads.  `FileReader` is the local one."""

    @property
    def size_bytes(self) -> int:
        """Length of the file."""

    def borrow(self, start: int, stop: int, scratch: Scratch) -> AbstractContextManager[memoryview]:
        """Lend the bytes [start, stop) read-only until the block ends; the view may lie in `scratch`."""

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes [start, stop) into memory of their own; for headers."""

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read many small ranges, several at once where that is faster."""

    def close(self) -> None:
        """Let go of the file."""


class ShardReaders(Protocol):
    """Lends the readers of a checkpoint's shards by name.  `ReaderPool` is the local one."""

    @property
    def read_ahead_bytes(self) -> int:
        """How far ahead it pays to announce."""

    def announce(self, shard: str, start: int, stop: int) -> None:
        """Say that the bytes [start, stop) will be borrowed once, after those announced before; returns at once."""

    def lend(self, shard: str) -> AbstractContextManager[RangeReader]:
        """Lend the reader of a shard until the block ends."""

    def cancel(self) -> None:
        """Wake every thread that waits for bytes; it raises `Stopped`.  No range can be borrowed after this."""

    def close(self) -> None:
        """Close all readers; none may be lent out."""

    def __enter__(self) -> ShardReaders: ...

    def __exit__(self, *exc_info: object) -> None: ...


class Storage(Protocol):
    """The files of a checkpoint.  Names are relative, with `/`; `location_of` gives what a message shows."""

    @property
    def location(self) -> str:
        """The whole, as a person would name it."""

    @property
    def directory(self) -> Path | None:
        """Where the files lie on this machine; None for a storage elsewhere."""

    @property
    def moved_bytes(self) -> int | None:
        """What came over the network so far; None for a storage on this machine."""

    @property
    def model(self) -> tuple[str, str | None]:
        """Model id, and the commit where it is known."""

    def location_of(self, name: str) -> str:
        """One file, as a person would name it."""

    def names(self) -> list[str]:
        """Sorted names of the files right inside, hidden ones left out; also of a shard that a dead link promises."""

    def walk(self, deep: bool, notes: list[str]) -> Iterator[tuple[str, int | None]]:
        """Yield name and length of every file in a fixed order, hidden ones left out; None for one that is no file.

        Not `deep`, only those right inside.  Adds a note on every folder that may not be read.
        """

    def file_bytes(self, name: str) -> int | None:
        """Length of a regular file, or None if there is none of that name."""

    def read_file(self, name: str) -> bytes:
        """Read a small file.  Raises `CheckpointError` or `NetworkError`."""

    def identity_of(self, name: str) -> Identity:
        """What tells this state of a shard from another.  Raises `CheckpointError`."""

    def require_unchanged(self, identities: Mapping[str, Identity]) -> None:
        """Raise `SourceChangedError` if a shard is not the one of its identity any more."""

    def open_shard(self, name: str, io: IoMode, identity: Identity | None = None) -> RangeReader:
        """Open one shard by itself; with `identity` raise `SourceChangedError` if it is not that one any more.

        Raises `CheckpointError` or `NetworkError`.
        """

    def open_readers(self, io: IoMode, identities: Mapping[str, Identity]) -> ShardReaders:
        """Return readers of these shards, each held to its identity."""

    def published_sha256(self, name: str) -> str | None:
        """64 hex digits of the SHA-256 that the Hub publishes for a shard, where that is known."""
