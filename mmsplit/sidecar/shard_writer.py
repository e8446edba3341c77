"""A merged shard, written from its first byte to its last and hashed on the way.

Tensors begin anywhere in a shard, but a write past the page cache must begin and end on a block of the disk.  So data
are laid into memory as far behind a page as they will lie behind a block of the file.  What does not fill the last
block of one piece is put before the next, and each block is written once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from mmsplit.checkpoint import aligned_buffer
from mmsplit.errors import IntegrityError
from mmsplit.sidecar.layout import SLOT_ALIGNMENT
from mmsplit.sidecar.output_files import give_name, partial_path
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.sidecar.set_manifest import ShardEntry


class ShardBlock:
    """Room for `room_bytes` of a shard, used again and again."""

    def __init__(self, room_bytes: int) -> None:
        self.memory = aligned_buffer(SLOT_ALIGNMENT + room_bytes)
        self.start = 0
        self.stop = 0

    def place(self, start: int, size_bytes: int) -> memoryview:
        """Return where the shard's bytes [`start`, `start + size_bytes`) go."""
        self.start, self.stop = start, start + size_bytes
        return self.data

    @property
    def data(self) -> memoryview:
        """The bytes that were placed."""
        lead = self.start % SLOT_ALIGNMENT
        return self.memory[lead : lead + self.stop - self.start]


class ShardWriter:
    """Takes the blocks of one shard in order, to hash them and to write them; one thread may do each.

    `on_finish` gets the shard's digest (`sha256:` and 64 hex digits) when it has its name.
    """

    def __init__(self, directory: Path, entry: ShardEntry, on_finish: Callable[[str], None] | None = None) -> None:
        self.entry = entry
        self.path = directory / entry.name
        self._partial = partial_path(self.path)
        self._on_finish = on_finish
        self._digest = None if entry.sha256 is None and on_finish is None else hashlib.sha256()
        self._file: PayloadFile | None = None
        self._position = 0
        self._rest = b""

    def hash(self, block: ShardBlock) -> None:
        """Hash the next block; after the last raise `IntegrityError` if the shard is not what the split recorded."""
        if self._digest is None:
            return
        self._digest.update(block.data)
        if block.stop < self.entry.size_bytes or self.entry.sha256 is None:
            return
        found = f"sha256:{self._digest.hexdigest()}"
        if found != self.entry.sha256:
            raise IntegrityError(
                "merged shard is not the original",
                path=self._partial,
                expected=self.entry.sha256,
                found=found,
                hint="Every chunk had its checksum, so suspect the memory or the set manifest; verify the set.",
            )

    def write(self, block: ShardBlock) -> None:
        """Write the next block, which has been hashed; with the last the shard is made durable and gets its name."""
        if self._file is None:
            self._file = PayloadFile(self._partial)
        if block.start != self._position:
            raise IntegrityError(
                "bytes of the shard do not follow each other",
                path=self._partial,
                expected=self._position,
                found=block.start,
            )
        lead = block.start % SLOT_ALIGNMENT
        stop = lead + len(block.data)
        whole = stop - stop % SLOT_ALIGNMENT
        block.memory[:lead] = self._rest
        if whole:
            self._file.write_block(block.start - lead, block.memory[:whole])
        self._rest = bytes(block.memory[whole:stop])
        self._position = block.stop
        if self._position == self.entry.size_bytes:
            self._finish(self._file)

    def close(self) -> None:
        """Close the file; what is not complete stays under its temporary name."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _finish(self, file: PayloadFile) -> None:
        file.write(self._position - len(self._rest), self._rest)
        file.finish(self.entry.size_bytes)
        self.close()
        give_name(self._partial, self.path)
        if self._on_finish is not None and self._digest is not None:
            self._on_finish(f"sha256:{self._digest.hexdigest()}")
