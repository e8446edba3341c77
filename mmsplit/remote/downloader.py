"""Files of a repository, each fetched to its place unless it is there already and right."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from mmsplit.errors import OutputExistsError
from mmsplit.remote.content_hash import Add, add_nothing, etag_of
from mmsplit.remote.disk import download_errors, locked
from mmsplit.remote.file_download import Received, download_file, partial_bytes
from mmsplit.remote.hub_cache import Place
from mmsplit.remote.remote_file import GoOn, never_stop
from mmsplit.remote.repository import HubFile, HubRepository

#: Contents up to this long are hashed whenever they are looked at: it costs nothing.
_SMALL_BYTES: Final = 1 << 20


class Presence(Enum):
    """What is there of a file."""

    ABSENT = "absent"
    PRESENT = "present"
    WRONG = "wrong"


class Found(NamedTuple):
    """What was found of a file before anything is done about it.

    `path` is where something is, right or wrong; `expected` and `actual` say what is wrong with it.
    `resumable_bytes` are in a partial file.
    """

    file: HubFile
    presence: Presence
    path: Path | None = None
    expected: str | None = None
    actual: str | None = None
    resumable_bytes: int = 0


class Fetched(NamedTuple):
    """A file in its place, what had been found of it, and what had to be done: nothing moved if it was there."""

    path: Path
    found: Found
    moved: Received


class Downloader:
    """Fetches files of one repository to one place; safe to share between threads and processes.

    With `verify` the hash of everything that is found is computed, not only that of small files.
    """

    def __init__(self, repository: HubRepository, place: Place, *, verify: bool = False) -> None:
        self._repository = repository
        self.place = place
        self._verify = verify

    def file(self, name: str) -> HubFile:
        """What the Hub lists of a file."""
        return self._repository.file(name)

    def look(self, name: str, add: Add = add_nothing, go_on: GoOn = never_stop) -> Found:
        """Say what is there of a file; nothing is changed.  `add` is told of bytes that are hashed."""
        file = self._repository.file(name)
        path = self.place.find(file)
        if path is None:
            return Found(file, Presence.ABSENT, resumable_bytes=partial_bytes(self.place.partial(file), file))
        with download_errors(path):
            size = path.stat().st_size
            if size != file.size_bytes:
                return self._wrong(file, path, f"{file.size_bytes:,} bytes", f"{size:,} bytes")
            if self._verify or size <= _SMALL_BYTES or not self.place.is_vouched_for(file):
                etag = etag_of(path, file, add, go_on)
                if etag != file.etag:
                    return self._wrong(file, path, file.etag, etag)
        return Found(file, Presence.PRESENT, path)

    def require_replaceable(self, found: Found) -> None:
        """Raise `OutputExistsError` for something that is there, is wrong, and may be somebody's work."""
        if found.presence is Presence.WRONG and not self.place.may_replace(found.file):
            raise OutputExistsError(
                "another file is there, which was not downloaded or was changed since",
                path=found.path,
                expected=found.expected,
                found=found.actual,
                hint="Move it away, choose another directory, or replace it with --force",
            )

    def fetch(
        self, name: str, add: Add = add_nothing, go_on: GoOn = never_stop, *, found: Found | None = None
    ) -> Fetched:
        """Return a file in its place; `found` is what a `look` saw, if there was one.

        A wrong content is replaced in one step, after the right one has arrived.  Raises `IntegrityError`,
        `NetworkError`, `SourceChangedError`, `OutputError` or whatever `go_on` raises; what arrived is kept.
        """
        found = found or self.look(name, go_on=go_on)
        file, place = found.file, self.place
        self.require_replaceable(found)
        if found.presence is Presence.PRESENT and place.is_in_place(file):
            add(file.size_bytes)
            return Fetched(place.path(file), found, Received(0, 0))
        with locked(place.lock(file), go_on):
            if found.presence is Presence.ABSENT:
                found = self.look(name, go_on=go_on)  # another process may have brought it meanwhile
                self.require_replaceable(found)
            moved = self._complete(found, add, go_on)
        return Fetched(place.path(file), found, moved)

    def _complete(self, found: Found, add: Add, go_on: GoOn) -> Received:
        file, place = found.file, self.place
        if found.presence is Presence.PRESENT:
            add(file.size_bytes)
            with download_errors(place.path(file)):
                place.put_in_place(file)
            return Received(0, 0)
        moved = download_file(self._repository.open_file(file.name), file, place.partial(file), add, go_on)
        with download_errors(place.path(file)):
            place.install(file)
        return moved

    def _wrong(self, file: HubFile, path: Path, expected: str, actual: str) -> Found:
        return Found(file, Presence.WRONG, path, expected, actual, partial_bytes(self.place.partial(file), file))
