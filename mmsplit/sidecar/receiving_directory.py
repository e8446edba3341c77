"""The directory that a published set is pulled into: what is there already, what of it is ours, the last name.

The set manifest lies there as `partition_set.json.partial`, whole and synced, from before the first other byte: it
says which set is on its way and which files are its own.  It gets its name when what was asked for is there.  Into a
directory that has it already, partitions of the same set come one by one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from mmsplit.checkpoint.directory import MAX_SMALL_FILE_BYTES
from mmsplit.digests import sha256_of
from mmsplit.durable import make_directory
from mmsplit.errors import FormatError, IntegrityError, OutputExistsError
from mmsplit.regular_files import read_regular
from mmsplit.remote.remote_file import GoOn, RemoteFile
from mmsplit.sidecar.json_fields import load_json_object
from mmsplit.sidecar.output_directory import STATE_NAME, OutputDirectory
from mmsplit.sidecar.output_files import (
    PARTIAL_SUFFIX,
    output_errors,
    require_no_links,
    sync_directory,
    write_whole_file,
)
from mmsplit.sidecar.partition_reader import MAX_MANIFEST_BYTES
from mmsplit.sidecar.piece_fetcher import FETCH_ATTEMPTS
from mmsplit.sidecar.set_manifest import (
    SET_MANIFEST_NAME,
    FileEntry,
    SetManifest,
    is_as_written,
    parse_set_manifest,
)

_PARTIAL_NAME: Final = SET_MANIFEST_NAME + PARTIAL_SUFFIX
#: Names that a small file of a model must not have: they mean something to mmsplit.
_RESERVED: Final = re.compile(
    r"(partition_(\d+|set)\.|unfinished_(split|merge)\.|\.mmsplit\.)", re.IGNORECASE | re.ASCII
)
_CHOOSE_OR_FORCE: Final = "Choose another directory, or use --force to replace what mmsplit wrote there."


class PublishedSet(NamedTuple):
    """A set manifest as it was published, in its own bytes.  `location` is where, for messages."""

    data: bytes
    manifest: SetManifest
    root_digest: str
    location: str


def read_published_set(file: RemoteFile, root_digest: str | None = None) -> PublishedSet:
    """Fetch and check the set manifest; with `root_digest` only the one that it stands for will do.

    Raises `IntegrityError` if it, or a part of it, is not what was written, or if it cannot be written to a directory
    without harm.
    """
    if file.size_bytes > MAX_MANIFEST_BYTES:
        raise FormatError("too large for a set manifest", path=file.location, found=file.size_bytes)
    data = b""
    for _ in range(FETCH_ATTEMPTS):
        data = file.read(0, file.size_bytes)
        if is_as_written(data):
            break
    manifest = parse_set_manifest(data, file.location, root_digest)
    if not is_as_written(data):
        raise IntegrityError(
            "set manifest says what was written, but not in the same bytes",
            path=file.location,
            hint="Publish the set again from where it was made.",
        )
    require_harmless(manifest.files, file.location)
    # The digest that parsing compared; fields of a later minor addition are part of it.
    return PublishedSet(data, manifest, str(load_json_object(data, file.location)["root_digest"]), file.location)


def require_harmless(files: Sequence[FileEntry], location: str) -> None:
    """Raise `IntegrityError` for a small file that would do harm in the directory of a set."""
    for entry in files:
        if _RESERVED.match(entry.name) or entry.name.lower().endswith(PARTIAL_SUFFIX):
            raise IntegrityError(f"a file of the model has a name of mmsplit's: {entry.name!r}", path=location)
        if entry.size_bytes > MAX_SMALL_FILE_BYTES:
            raise IntegrityError(
                f"{entry.name} is too large for a small file of a model",
                path=location,
                expected=f"at most {MAX_SMALL_FILE_BYTES:,} bytes",
                found=entry.size_bytes,
            )


class ReceivingDirectory:
    """What `published` is received into; `out` is locked.  `force` replaces what mmsplit wrote there."""

    def __init__(self, out: OutputDirectory, published: PublishedSet, *, force: bool) -> None:
        self._out = out
        self._published = published
        self._force = force
        self._path = out.path / SET_MANIFEST_NAME
        self._partial = out.path / _PARTIAL_NAME
        #: Whether this set is there already, or on its way.
        self.has_this_set = False
        self._replaces = False

    def look(self) -> None:
        """Find out what is there.  Changes nothing; raises `OutputExistsError` for what bars this pull."""
        root = self._out.path
        if os.path.lexists(self._path):
            self.has_this_set = self._is_this_set(self._path)
            refusal = "output holds another partition set, or one that cannot be read"
        elif os.path.lexists(self._partial) and self._is_this_set(self._partial):
            self.has_this_set = True
            refusal = ""
        elif (root / STATE_NAME).exists():
            refusal = "output holds an unfinished split"
        elif os.path.lexists(self._partial):
            refusal = "output holds an unfinished pull of another set"
        else:
            refusal = ""
        if self.has_this_set:
            return
        if self._force:
            self._out.prepare({}, "force")
            self._replaces = True
        elif refusal:
            raise OutputExistsError(refusal, path=root, expected=self._published.root_digest, hint=_CHOOSE_OR_FORCE)
        else:
            self._out.prepare({}, "refuse")

    def missing_files(self) -> tuple[FileEntry, ...]:
        """Return the small files that are to be fetched.  Raises `OutputExistsError` for a name that is taken."""
        return tuple(entry for entry in self._published.manifest.files if self._is_missing(entry))

    def begin(self) -> None:
        """Remove what is to be replaced, and record what is on its way.  From here on the output changes."""
        if self._replaces:
            self._out.remove_own_files()
        if not self.has_this_set:
            write_whole_file(self._partial, self._published.data)

    def receive_file(self, entry: FileEntry, open_file: Callable[[str], RemoteFile], go_on: GoOn) -> int:
        """Fetch a small file and give it its name; return the bytes that were fetched."""
        data, fetched = _fetch_small_file(entry, open_file, go_on) if entry.size_bytes else (b"", 0)
        place = self._out.path / entry.name
        with output_errors(place):
            if place.parent != self._out.path:
                make_directory(place.parent)
        write_whole_file(place, data)
        return fetched

    def finish(self) -> None:
        """Give the set manifest its name, which makes a set of what is there."""
        with output_errors(self._path):
            if not self._path.exists():
                os.replace(self._partial, self._path)
                sync_directory(self._out.path)
            elif read_regular(self._path) != self._published.data:
                write_whole_file(self._path, self._published.data)
            (self._out.path / STATE_NAME).unlink(missing_ok=True)
        sync_directory(self._out.path)

    def _is_this_set(self, path: Path) -> bool:
        """Whether a set manifest is that of this set; its bytes may have been put differently by an editor."""
        with output_errors(path):
            if not path.is_file() or path.stat().st_size > MAX_MANIFEST_BYTES:
                return False
            data = read_regular(path)
        if data == self._published.data:
            return True
        if path == self._partial:
            return False
        try:
            parse_set_manifest(data, str(path))
        except (FormatError, IntegrityError):
            return False
        if load_json_object(data, str(path))["root_digest"] != self._published.root_digest:
            return False
        if not self._force:
            raise OutputExistsError(
                "set manifest says what was published, but not in the same bytes",
                path=path,
                hint="Use --force to fetch it again.",
            )
        return True

    def _is_missing(self, entry: FileEntry) -> bool:
        require_no_links(self._out.path, entry.name)
        place = self._out.path / entry.name
        if not os.path.lexists(place):
            return True
        found = None
        with output_errors(place):
            if place.is_file():
                found = sha256_of(read_regular(place))
        if found == entry.sha256:
            return False
        if found is not None and ((self._force and self.has_this_set) or found in self._digests_of_ours(entry.name)):
            return True
        raise OutputExistsError(
            "a file that is not the published one has the name of one that belongs to the model",
            path=place,
            expected=entry.sha256,
            found=found or "no regular file",
            hint="Move it away" + (", or use --force to fetch it again." if self.has_this_set and found else "."),
        )

    def _digests_of_ours(self, name: str) -> Sequence[str]:
        """Return the SHA-256 that a small file of the set that is replaced may have."""
        ours = self._out.small_files
        if self.has_this_set:  # a pull that replaced another set, and was killed
            recorded = self._out.read_state().get("files")
            ours = recorded if isinstance(recorded, dict) else {}
        return () if ours is None else ours.get(name, ())


def _fetch_small_file(entry: FileEntry, open_file: Callable[[str], RemoteFile], go_on: GoOn) -> tuple[bytes, int]:
    file = open_file(entry.name)
    found: object = f"{file.size_bytes:,} bytes"
    fetched = 0
    if file.size_bytes == entry.size_bytes:
        for _ in range(FETCH_ATTEMPTS):
            data = file.read(0, entry.size_bytes, go_on)
            fetched += len(data)
            found = sha256_of(data)
            if found == entry.sha256:
                return data, fetched
    raise IntegrityError(
        "published file of the model is not the one that its set was made with",
        path=file.location,
        expected=f"{entry.size_bytes:,} bytes, {entry.sha256}",
        found=found,
        hint="Publish the set again from where it was made.",
    )
