"""Files of a download on this machine's disk: locks that huggingface_hub respects, durable names, space, errors."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from mmsplit.durable import make_directory, sync_directory
from mmsplit.errors import NoSpaceError, OutputError
from mmsplit.remote.remote_file import GoOn, never_stop

_FULL: Final = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
#: A caller who gives up while another process holds the lock is noticed after so long.
_LOCK_STEP_SECONDS: Final = 0.2


@contextmanager
def download_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into an `OutputError` about `path` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoSpaceError(
                f"cannot write: {error.strerror}",
                path=path,
                hint="Free some space, then run the same command again: it continues from what is there.",
            ) from error
        raise OutputError(
            f"cannot write: {error.strerror or error}",
            path=error.filename or path,
            hint="Check that the directory is writable, or choose another one",
        ) from error


@contextmanager
def locked(path: Path, go_on: GoOn = never_stop) -> Iterator[None]:
    """Hold the lock file `path` as huggingface_hub does, so that its processes and ours take turns."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # imported there, not listed

    with download_errors(path):
        make_directory(path.parent)  # it may be the first that is made in a new cache
    with ExitStack() as stack:
        while True:
            go_on()
            with download_errors(path):
                try:
                    stack.enter_context(WeakFileLock(path, timeout=_LOCK_STEP_SECONDS))
                    break
                except TimeoutError:
                    pass  # somebody else has it still
        yield


def write_small_file(path: Path, text: str) -> None:
    """Write a small file of bookkeeping so that nobody ever reads a part of it, whoever else writes it."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    make_directory(path.parent)
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def require_space(directory: Path, needed_bytes: int) -> None:
    """Raise `NoSpaceError` if the file system of `directory`, which need not exist yet, has less free for this user."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    with download_errors(directory):
        free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise NoSpaceError(
            "too little free space for this download",
            path=directory,
            expected=f"{needed_bytes:,} bytes free",
            found=free,
            hint=f"Free {needed_bytes - free:,} bytes, or choose another disk: --cache-dir, --local-dir, HF_HOME",
        )
