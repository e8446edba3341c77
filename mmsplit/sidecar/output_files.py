"""Writing files so that a name never stands for less than all of it, and turning the system's refusals into ours."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from mmsplit import durable
from mmsplit.checkpoint import FileReader, Scratch
from mmsplit.errors import NoSpaceError, OutputError, OutputExistsError

#: A file under construction is called NAME + this.
PARTIAL_SUFFIX: Final = ".partial"
_LONGEST_NAME_BYTES: Final = 255
_NO_LINKS: Final = getattr(os, "O_NOFOLLOW", 0)
_HASH_BYTES: Final = 4 << 20


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into an `OutputError` about `path` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise NoSpaceError(
                f"cannot write: {error.strerror}",
                path=path,
                hint="Free some space, then run the same command again, with --resume where it has that option.",
            ) from error
        raise OutputError(
            f"cannot write: {error.strerror or error}",
            path=path,
            hint="Check that the directory exists, is writable and that its disk is sound.",
        ) from error


def refuse_shortage(error: OSError, path: Path) -> None:
    """Raise `OutputError` if the machine, not the file, is at fault: too many open files, too little memory."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise OutputError(
            f"cannot open: {error.strerror}", path=path, hint="Raise the limit (ulimit -n), or close other programs."
        ) from error


def partial_path(path: Path) -> Path:
    """Return what a file is called until it is complete; a hash stands for a name too long to have a suffix."""
    name = path.name
    if len(os.fsencode(name)) + len(PARTIAL_SUFFIX) > _LONGEST_NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(name + PARTIAL_SUFFIX)


def open_new(path: Path) -> int:
    """Open a file for writing that has no other name.  What has this one, a link perhaps, is removed, not written to.

    Raises `OSError`, as the next does.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags, 0o666)
    except FileExistsError:
        path.unlink()
        return os.open(path, flags, 0o666)


def open_unfinished(path: Path) -> int:
    """Open a file under construction for going on, or begin it.

    Raises `OutputExistsError` if its content has another name, too, which may be anybody's: it is a link.
    """
    is_link = path.is_symlink()
    fd = -1 if is_link else os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINKS | getattr(os, "O_BINARY", 0), 0o666)
    if is_link or os.fstat(fd).st_nlink > 1:
        if fd >= 0:
            os.close(fd)
        raise OutputExistsError(
            "unfinished file is a link: what is written to it would change a file of another name",
            path=path,
            hint="Remove the link, then run again.",
        )
    return fd


def require_no_links(root: Path, name: str) -> None:
    """Raise `OutputExistsError` if a folder on the way from `root` to `name` is a link, which may lead anywhere."""
    folder = root
    for part in name.split("/")[:-1]:
        folder /= part
        with output_errors(folder):  # a name may be too long
            is_link = folder.is_symlink()
        if is_link:
            raise OutputExistsError(
                f"a folder in the output is a link: {name} would be written elsewhere",
                path=folder,
                hint="Remove the link, or choose another directory.",
            )


def write_whole_file(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name, sync it, and rename it to `path`; then sync the directory."""
    partial = partial_path(path)
    with output_errors(path):
        fd = open_new(partial)
        try:
            write_all(fd, memoryview(data), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    give_name(partial, path)


def give_name(partial: Path, path: Path) -> None:
    """Rename a file that is complete and synced, and make the name durable."""
    with output_errors(path):
        os.replace(partial, path)
    sync_directory(path.parent)


def sha256_of_file(path: Path) -> str:
    """Return the digest of a file in the output."""
    digest, scratch = hashlib.sha256(), Scratch()
    with output_errors(path), FileReader(path) as reader:
        for start in range(0, reader.size_bytes, _HASH_BYTES):
            with reader.borrow(start, min(start + _HASH_BYTES, reader.size_bytes), scratch) as view:
                digest.update(view)
    return f"sha256:{digest.hexdigest()}"


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset`, however often the system takes only a part of it."""
    if not hasattr(os, "pwrite"):  # Windows; each file has one writer there
        os.lseek(fd, offset, os.SEEK_SET)
        while data:
            data = data[os.write(fd, data) :]
        return
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def sync_directory(path: Path) -> None:
    """Make renames and unlinks in `path` durable; the operating system's refusal becomes `OutputError`."""
    with output_errors(path):
        durable.sync_directory(path)
