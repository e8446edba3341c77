"""SHA-256 of whole shards, and what the Hub's cache already says about them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Final

from mmsplit.checkpoint.checkpoint import Checkpoint
from mmsplit.checkpoint.file_reader import Scratch
from mmsplit.checkpoint.reader_pool import ReaderPool
from mmsplit.errors import CheckpointError

_RANGE_BYTES: Final = 4 << 20
_SHA256_HEX: Final = re.compile(r"^[0-9a-f]{64}$", re.ASCII)


class ShardHasher:
    """Hashes shards from end to end; holds a scratch buffer, so one per thread."""

    def __init__(self, checkpoint: Checkpoint, readers: ReaderPool, go_on: Callable[[], None]) -> None:
        """`go_on` is called between ranges and may raise to end the work."""
        self._paths = {shard.name: shard.path for shard in checkpoint.shards}
        self._readers = readers
        self._go_on = go_on
        self._scratch = Scratch()

    def sha256(self, shard: str) -> str:
        """Return `sha256:` and 64 hex digits; raises `CheckpointError` if the Hub's cache names another digest."""
        digest = hashlib.sha256()
        with self._readers.lend(shard) as reader:
            for start in range(0, reader.size_bytes, _RANGE_BYTES):
                self._go_on()
                stop = min(start + _RANGE_BYTES, reader.size_bytes)
                with reader.borrow(start, stop, self._scratch) as view:
                    digest.update(view)
        found = digest.hexdigest()
        # A snapshot of the Hub's cache links to blobs/<SHA-256 of the file> for files kept in large-file storage.
        blob = self._paths[shard].resolve()
        if blob.parent.name == "blobs" and _SHA256_HEX.match(blob.name) and blob.name != found:
            raise CheckpointError(
                "shard is not what the Hub has: its SHA-256 is not the one it is cached under",
                path=blob,
                expected=blob.name,
                found=found,
                hint="Delete this file and download it again.",
            )
        return f"sha256:{found}"
