"""What the Hub calls a content: the SHA-256 of a large file, git's hash of a small one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mmsplit.remote.remote_file import GoOn, never_stop
from mmsplit.remote.repository import HubFile

#: Called with bytes that are done now; with a negative number when they were thrown away.
Add = Callable[[int], None]
_BLOCK_BYTES: Final = 1 << 20


def add_nothing(count_bytes: int) -> None:
    """The `add` of a caller who shows no progress."""


class ContentHash:
    """Hashes a content block by block, of the length that the Hub lists."""

    def __init__(self, file: HubFile) -> None:
        if file.sha256 is not None:
            self._hash = hashlib.sha256()
        else:
            self._hash = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)

    def update(self, block: bytes | memoryview) -> None:
        """Take in the next bytes."""
        self._hash.update(block)

    def etag(self) -> str:
        """What the Hub calls all bytes so far; equals `HubFile.etag` if they are that file."""
        return self._hash.hexdigest()


def hash_prefix(path: Path, content: ContentHash, stop: int, add: Add = add_nothing, go_on: GoOn = never_stop) -> int:
    """Feed the first `stop` bytes of a file to `content`; return how many there were.  Raises `OSError`."""
    position = 0
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, max(stop, 1))))
    with path.open("rb", buffering=0) as source:
        while position < stop:
            go_on()
            count = source.readinto(buffer[: min(len(buffer), stop - position)])
            if not count:
                break
            content.update(buffer[:count])
            position += count
            add(count)
    return position


def etag_of(path: Path, file: HubFile, add: Add = add_nothing, go_on: GoOn = never_stop) -> str:
    """Hash a file as the Hub would that lists it as `file`; it must have that length.  Raises `OSError`."""
    content = ContentHash(file)
    hash_prefix(path, content, file.size_bytes, add, go_on)
    return content.etag()
