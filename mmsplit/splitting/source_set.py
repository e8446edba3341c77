"""What a run asks of a source that is a partition set: its chunks are encoded already."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from mmsplit.checkpoint import ShardReaders
from mmsplit.sidecar.chunk_copier import StoredChunks
from mmsplit.sidecar.layout import Slot


class SourceSet(Protocol):
    """A partition set that a run takes its chunks from as they are stored."""

    def stored_bytes(self, slots: Iterable[Slot]) -> int:
        """Return what slots are going to take of a payload, padding included, at most.

        Raises `MissingPartitionError` if a partition that has bytes of them is not there, before anything is written.
        """

    def chunks(self, readers: ShardReaders) -> StoredChunks:
        """Return what gives the chunks; `readers` are those of the checkpoint that the set stands for."""
