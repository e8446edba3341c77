"""A checkpoint in a directory of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from mmsplit.checkpoint.file_reader import FileReader, Fingerprint, IoMode, fingerprint_of
from mmsplit.checkpoint.reader_pool import ReaderPool
from mmsplit.checkpoint.storage import Identity
from mmsplit.checkpoint.weight_files import form_of
from mmsplit.errors import CheckpointError
from mmsplit.regular_files import read_regular

_SHA256_HEX: Final = re.compile(r"^[0-9a-f]{64}$", re.ASCII)
#: What makes a folder somebody's partition set, finished or not, rather than part of the model.
_OUTPUT_MARK: Final = re.compile(r"^(partition_(\d+|set)|unfinished_(split|merge))\.json(\.partial)?$", re.ASCII)


class LocalStorage:
    """The files below `directory`.  Links are followed: a snapshot of the Hub's cache consists of them.

    But not a small file's to anywhere: whoever made the directory could have put a link to a private key there, which
    would be carried along, and published.  It must truly lie below the directory, or where weights of it truly lie.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def directory(self) -> Path:
        """Where they are."""
        return self._directory

    @property
    def moved_bytes(self) -> None:
        """Nothing comes over a network."""

    @property
    def location(self) -> str:
        """The directory."""
        return str(self.directory)

    @property
    def model(self) -> tuple[str, str | None]:
        """Model id and revision: from the Hub cache's own folder names where it is one, else the folder's name."""
        parts = self.directory.absolute().parts
        if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
            return parts[-3].removeprefix("models--").replace("--", "/", 1), parts[-1]
        # ".." is taken out, but links are kept: the name a person gave
        return Path(os.path.abspath(self.directory)).name, None  # noqa: PTH100

    def location_of(self, name: str) -> str:
        """Path of a file."""
        return str(self.directory / name)

    def names(self) -> list[str]:
        """Sorted names of the files right inside; raises `OSError`."""
        with os.scandir(self.directory) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_file(entry))

    def walk(self, deep: bool, notes: list[str]) -> Iterator[tuple[str, int | None]]:
        """Yield name and length of every file; other people's partition sets are left out.

        Of what is no regular file, or a link that leads elsewhere, the length is None.
        """

        def unreadable(error: OSError) -> None:
            notes.append(f"{error.filename} is not carried along: {error.strerror}")

        homes = self._homes()
        for directory, folders, files in os.walk(self.directory, onerror=unreadable):
            folders[:] = sorted(
                name for name in folders if deep and not name.startswith(".") and not _is_output(Path(directory, name))
            )
            prefix = Path(directory).relative_to(self.directory)
            for name in sorted(files):
                if not name.startswith("."):
                    path, relative = Path(directory, name), (prefix / name).as_posix()
                    is_file = path.is_file()
                    if is_file and form_of(name) is None and not _lies_in(path, homes):
                        notes.append(f"{relative} is not carried along: it is a link that leads out of the checkpoint")
                        is_file = False
                    yield relative, path.stat().st_size if is_file else None

    def file_bytes(self, name: str) -> int | None:
        """Length of a regular file, or None; raises `OSError` if it cannot be looked at."""
        path = self.directory / name
        return path.stat().st_size if path.is_file() else None

    def read_file(self, name: str) -> bytes:
        """Read a small file."""
        path = self.directory / name
        try:
            return read_regular(path)
        except OSError as error:
            raise CheckpointError(f"cannot read a file of the model: {error.strerror}", path=path) from error

    def identity_of(self, name: str) -> Identity:
        """Size, time, inode and device of a shard."""
        path = self._directory / name
        try:
            return fingerprint_of(path)
        except OSError as error:
            raise CheckpointError(f"cannot open: {error.strerror}", path=path) from error

    def require_unchanged(self, identities: Mapping[str, Identity]) -> None:
        """Look at each shard once more."""
        for name, identity in identities.items():
            self.open_shard(name, "pread", identity).close()

    def open_shard(self, name: str, io: IoMode, identity: Identity | None = None) -> FileReader:
        """Open a shard; the operating system's refusals become `CheckpointError`."""
        reader = self._open(name, io)
        if identity is not None and reader.fingerprint != identity:
            # Let the reader say it in the one way it is said everywhere.
            reader.fingerprint = Fingerprint(*identity)  # type: ignore[arg-type]
            try:
                reader.require_unchanged()
            finally:
                reader.close()
        return reader

    def open_readers(self, io: IoMode, identities: Mapping[str, Identity]) -> ReaderPool:
        """Return a pool that opens each shard at its first use."""
        return ReaderPool(lambda name: self.open_shard(name, io, identities[name]))

    def published_sha256(self, name: str) -> str | None:
        """Read it off the Hub's cache: a snapshot links to blobs/<SHA-256> for files in large-file storage."""
        blob = (self.directory / name).resolve()
        return blob.name if blob.parent.name == "blobs" and _SHA256_HEX.match(blob.name) else None

    def _homes(self) -> frozenset[str]:
        """The true folders of the weights right inside, and of the directory itself."""
        weights = [self.directory / name for name in self.names() if form_of(name) is not None]
        folders = [str(Path(os.path.realpath(path)).parent) for path in weights]
        return frozenset((os.path.realpath(self.directory), *folders))

    def _open(self, name: str, io: IoMode) -> FileReader:
        path = self.directory / name
        try:
            return FileReader(path, io=io)
        except OSError as error:
            raise CheckpointError(f"cannot open: {error.strerror}", path=path) from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a shard that a link promises: a Hub cache that lost a blob has such links."""
    try:
        if entry.is_file() or entry.is_dir():
            return entry.is_file()
    except OSError:
        pass  # a link that leads to itself
    return entry.is_symlink() and form_of(entry.name) is not None


def _lies_in(path: Path, homes: frozenset[str]) -> bool:
    """Whether a file truly lies in one of these folders, or below it."""
    return any(str(folder) in homes for folder in Path(os.path.realpath(path)).parents)


def _is_output(folder: Path) -> bool:
    try:
        return any(_OUTPUT_MARK.match(name) for name in os.listdir(folder))
    except OSError:
        return False  # the walk says why it cannot be read
