"""A directory whose files are deleted one after the other, because what they hold is elsewhere by now.

Refused is what would free nothing, or harm others: links, of either kind.  Nobody else may be deleting here: two runs
that consume one directory into two outputs would each be left with half.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from mmsplit.errors import OutputError, OutputLockedError, RequestError
from mmsplit.sidecar.output_files import output_errors, sync_directory


class ConsumedDirectory:
    """A directory, locked from `__enter__` to `__exit__` against others that delete in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def __enter__(self) -> ConsumedDirectory:
        if os.name == "nt":  # directories cannot be opened there
            return self
        import fcntl

        with output_errors(self.path):
            self._fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.__exit__(None, None, None)
            if not isinstance(error, BlockingIOError):
                raise OutputError(f"cannot lock: {error.strerror}", path=self.path) from error
            raise OutputLockedError(
                "another run deletes files in this directory", path=self.path, hint="Wait until it has ended."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def require_deletable(self, names: Iterable[str]) -> None:
        """Raise unless deleting these files is possible, frees their space, and takes nothing from anybody else."""
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise OutputError(
                "files cannot be deleted here: no permission, or the file system is read-only",
                path=self.path,
                hint="Leave --consume out, or get the permission to write to this directory.",
            )
        folder = self.path.stat()
        for name in names:
            path = self.path / name
            with output_errors(path):
                found = path.lstat()
            if stat.S_ISLNK(found.st_mode):
                raise RequestError(
                    "is a link: what it leads to may belong to others, as in the Hub's cache",
                    path=path,
                    hint="Only plain files are consumed. Leave --consume out.",
                )
            if found.st_nlink > 1:
                raise RequestError(
                    "has another name (a hard link): deleting this one would free nothing",
                    path=path,
                    hint="Remove the other name first, or leave --consume out.",
                )
            is_sticky = bool(folder.st_mode & stat.S_ISVTX) and hasattr(os, "geteuid")
            if is_sticky and os.geteuid() not in (0, found.st_uid, folder.st_uid):
                raise OutputError(
                    "cannot be deleted: it belongs to another user, in a directory with the sticky bit", path=path
                )

    def delete(self, names: Sequence[str]) -> None:
        """Delete files, and make that durable; one that is gone already is none the less deleted."""
        for name in names:
            with output_errors(self.path / name):
                (self.path / name).unlink(missing_ok=True)
        if names:
            sync_directory(self.path)

    def freed_bytes(self, name: str, output: Path) -> int:
        """Return how much more room the file system of `output` has when a file is deleted: none if it is another."""
        with output_errors(self.path / name):
            found = (self.path / name).stat()
        with output_errors(output):
            if found.st_dev != output.stat().st_dev:
                return 0
        blocks = getattr(found, "st_blocks", None)
        return found.st_size if blocks is None else min(found.st_size, blocks * 512)


def settle(paths: Iterable[Path]) -> None:
    """Make files durable and forget what memory has of them, so that whoever reads them next reads the disk."""
    folders = set()
    for path in paths:
        folders.add(path.parent)
        with output_errors(path):
            fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
            try:
                os.fsync(fd)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    for folder in folders:
        sync_directory(folder)
