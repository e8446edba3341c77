"""What a target of fuzzing is: seeds, a way to change them, and what must hold for whatever comes of that."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from guard import MOST_BYTES, Guard, guarded

from mmsplit.errors import MmsplitError

CORPUS = Path(__file__).parent / "corpus"


class Wrong(AssertionError):  # noqa: N818 - a law that does not hold
    """Something was accepted that must not be, or came out other than it went in."""


class Target(NamedTuple):
    """`check` raises an error of ours for what it refuses; whatever else it raises is a finding.

    A case is bytes, or a directory's files by name; `mutate` changes one, given another to take pieces of.  `check`
    takes a folder of its own, too, where the target `needs_folder`: it may read there, and write into "out".
    """

    name: str
    seeds: Callable[[], dict[str, Any]]
    mutate: Callable[[Any, Any, Random], Any]
    check: Callable[..., object]
    needs_folder: bool = False


class Outcome(NamedTuple):
    """`kind` is "accepted" or the name of the error; `signature` is what tells this outcome from others."""

    kind: str
    signature: str


def require(holds: bool, what: str) -> None:
    """Raise `Wrong` unless something holds."""
    if not holds:
        raise Wrong(what)


def run(target: Target, case: Any, *, most_bytes: int | None = MOST_BYTES) -> Outcome:
    """Run a target on a case; raises for everything that must not happen."""
    if not target.needs_folder:
        return _run(lambda: target.check(case), Guard(), most_bytes)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        (folder / "out").mkdir()
        write, check = target.check(case, folder)
        write()
        return _run(check, Guard(reads=(folder,), writes=(folder / "out",)), most_bytes)


def _run(check: Callable[[], object], guard: Guard, most_bytes: int | None) -> Outcome:
    with guarded(guard, most_bytes=most_bytes):
        try:
            check()
        except MmsplitError as error:
            _require_well_said(error)
            # The message without what changes with every case.
            return Outcome(type(error).__name__, re.sub(r"'[^']*'|\"[^\"]*\"|[\d,]+", "#", error.what)[:60])
    return Outcome("accepted", "accepted")


def _require_well_said(error: MmsplitError) -> None:
    """An error names the file, and a hostile file does not decide what a terminal shows."""
    message = str(error)
    require(error.path is not None, f"no path in: {message[:200]}")
    require(len(message) < 5000, f"a message of {len(message):,} characters: {message[:200]}")
    require(message.replace("\n", "").isprintable(), f"a message that is no text: {message[:200]!r}")


@contextmanager
def without_waiting() -> Iterator[None]:
    """Nothing here loses power: syncs need not wait for the disk."""
    real = os.fsync
    os.fsync = lambda _: None
    try:
        yield
    finally:
        os.fsync = real
