"""What is done to the machine: file systems mounted, time limited; and what is left out, so as not to wait for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NotHere(Exception):  # noqa: N818 - a condition, which a test turns into a skip
    """This machine or this user cannot do it; says why."""


class Overdue(BaseException):
    """Something took too long; not an `Exception`, so that nobody recovers from it."""


@contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Raise `Overdue` in the block if it does not end in time.  In the main thread only."""

    def give_up(*_: object) -> None:
        raise Overdue(f"not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Leave syncs out: processes are killed here, not machines, and a loss of power is simulated."""
    real = os.fsync
    os.fsync = lambda _: None  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = real


@contextmanager
def skipped_where_not_here() -> Iterator[None]:
    """Skip the test, with the reason, where the machine cannot do it."""
    import pytest

    try:
        yield
    except NotHere as reason:
        pytest.skip(str(reason))


@contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """Mount a file system in memory; raises `NotHere` where that is not allowed."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise NotHere("only root of a Linux may mount")
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise NotHere(f"mount: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    """Change the options of what is mounted."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)
