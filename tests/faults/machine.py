"""What is done to the machine: file systems mounted, limits set, signals sent; and what is left out, so as not to wait."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NotHere(Exception):  # noqa: N818 - a condition, which a test turns into a skip
    """This machine or this user cannot do it; says why."""


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
