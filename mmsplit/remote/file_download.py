"""One file, from the Hub to a partial file, resumed to the byte and checked before anybody may have it.

Strategy.  Bytes are appended to a partial file that is named after the content it is going to be, so that whoever
comes next, in another process or after a reboot, continues it.  What is there is hashed again rather than believed, and
the hash of the whole decides: a content that is not the Hub's is thrown away and fetched anew, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from mmsplit.durable import make_directory
from mmsplit.errors import IntegrityError
from mmsplit.remote.content_hash import Add, ContentHash, add_nothing, hash_prefix
from mmsplit.remote.disk import download_errors
from mmsplit.remote.remote_file import GoOn, RemoteFile, never_stop
from mmsplit.remote.repository import HubFile

#: Ends the name of a partial file.  huggingface_hub never continues such a file, and `hf cache prune` removes it.
PARTIAL_SUFFIX: Final = ".mmsplit.incomplete"
_ATTEMPTS: Final = 2


class Received(NamedTuple):
    """Bytes of one file: those that came over the network, and those that an earlier run had left."""

    received_bytes: int
    resumed_bytes: int


def partial_bytes(partial: Path, file: HubFile) -> int:
    """How much of a file an earlier run left behind; 0 for what cannot be part of it."""
    try:
        size = partial.stat().st_size
    except OSError:
        return 0
    return size if size <= file.size_bytes else 0


def download_file(
    remote: RemoteFile, file: HubFile, partial: Path, add: Add = add_nothing, go_on: GoOn = never_stop
) -> Received:
    """Complete `partial` to the content that the Hub lists as `file`, verified and synced; the caller holds its lock.

    Raises `IntegrityError` if what the server sends is twice another content, `NetworkError`, `SourceChangedError`,
    `OutputError`, and whatever `go_on` raises; except for the first, what arrived stays in `partial`.
    """
    received, found = 0, ""
    for _ in range(_ATTEMPTS):
        content = ContentHash(file)
        with download_errors(partial):
            make_directory(partial.parent)
            start = _take_up(partial, file, content, add, go_on)
        received += _append(remote, file, partial, start, content, add, go_on)
        found = content.etag()
        if found == file.etag:
            return Received(received, start)
        add(-file.size_bytes)
        with download_errors(partial):
            partial.unlink()
    raise IntegrityError(
        "what arrives is not what the Hub lists",
        path=remote.location,
        expected=_named(file, file.etag),
        found=found,
        hint="A proxy or mirror in between may deliver another file: try without it, or another HF_ENDPOINT",
    )


def _take_up(partial: Path, file: HubFile, content: ContentHash, add: Add, go_on: GoOn) -> int:
    """Hash what an earlier run left and return its length; an impossible length is thrown away."""
    start = partial_bytes(partial, file)
    if start == 0:
        partial.write_bytes(b"")
        return 0
    return hash_prefix(partial, content, start, add, go_on)


def _append(
    remote: RemoteFile, file: HubFile, partial: Path, start: int, content: ContentHash, add: Add, go_on: GoOn
) -> int:
    """Write all bytes from `start` on, and sync; return how many they were."""
    position = start
    # Unbuffered, so that a process that is killed leaves all it had received.  Not in append mode: where locks do not
    # work, two writers put the same bytes at the same offsets.
    with download_errors(partial):
        out = partial.open("r+b", buffering=0)
    with out:
        with download_errors(partial):
            out.seek(start)
        for block in remote.stream(start, file.size_bytes, go_on):
            with download_errors(partial):
                _write_all(out.write, block)
            content.update(block)
            position += len(block)
            add(len(block))
        with download_errors(partial):
            os.fsync(out.fileno())
    return position - start


def _write_all(write: Callable[[memoryview], int | None], block: bytes) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[write(rest) or 0 :]


def _named(file: HubFile, digest: str) -> str:
    return f"{'SHA-256' if file.sha256 else 'git blob'} {digest}"
