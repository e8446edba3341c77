"""SHA-256 of whole shards, held against what the Hub publishes of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Final

from mmsplit.checkpoint.checkpoint import Checkpoint
from mmsplit.checkpoint.file_reader import Scratch
from mmsplit.checkpoint.storage import ShardReaders
from mmsplit.errors import CheckpointError

_RANGE_BYTES: Final = 4 << 20


class ShardHasher:
    """Hashes shards from end to end; holds a scratch buffer, so one per thread."""

    def __init__(self, checkpoint: Checkpoint, readers: ShardReaders, go_on: Callable[[], None]) -> None:
        """`go_on` is called between ranges and may raise to end the work."""
        self._checkpoint = checkpoint
        self._readers = readers
        self._go_on = go_on
        self._scratch = Scratch()

    def sha256(self, shard: str) -> str:
        """Return `sha256:` and 64 hex digits; raises `CheckpointError` if the Hub publishes another digest."""
        digest = hashlib.sha256()
        with self._readers.lend(shard) as reader:
            for start in range(0, reader.size_bytes, _RANGE_BYTES):
                self._go_on()
                stop = min(start + _RANGE_BYTES, reader.size_bytes)
                with reader.borrow(start, stop, self._scratch) as view:
                    digest.update(view)
        found = digest.hexdigest()
        published = self._checkpoint.published_sha256(shard)
        if published not in (None, found):
            raise CheckpointError(
                "shard is not what the Hub has: its SHA-256 is not the published one",
                path=os.path.realpath(self._checkpoint.location_of(shard)),  # the blob: the link would only come back
                expected=published,
                found=found,
                hint="Delete this file and download it again.",
            )
        return f"sha256:{found}"
