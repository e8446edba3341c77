"""What was verified when: a file of JSON lines that the user names, read by programs and by the next check.

A line is appended by one write and synced.  What a crash may leave of it, or somebody else wrote, is not believed: it
counts as if it were not there, so that chunks are verified once too often rather than not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from mmsplit.errors import OutputError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.output_files import output_errors
from mmsplit.sidecar.partition_reader import Fault
from mmsplit.sidecar.scrub import Stretch

HISTORY_FORMAT: Final = "mmsplit-history"
_VERSION: Final = 1
#: So many faults are spelt out in a line; `faults` counts all.
_MOST_PROBLEMS: Final = 20
_LEVELS: Final = ("quick", "stored", "full")


class HistoryEntry(NamedTuple):
    """One verification, begun at `time` (UTC).

    What was verified is `of`: the root digest of a set, or the digest of the manifest of the single partition
    `partition`; None where that could not be read.  `digests` says whether chunks were held to their digests, too.
    `stretches` are the places that were looked at, `subset` and `since` how they were asked for.
    """

    time: datetime
    of: str | None
    partition: int | None
    level: str
    digests: bool
    subset: str | None
    since: datetime | None
    stretches: tuple[Stretch, ...]
    chunks: int
    bytes: int
    faults: int


def append_entry(path: Path, entry: HistoryEntry, problems: Sequence[Fault]) -> None:
    """Append one line and sync it.  Raises `OutputError`."""
    values = {
        "format": HISTORY_FORMAT,
        "format_version": _VERSION,
        **entry._asdict(),
        "time": _text_of(entry.time),
        "since": None if entry.since is None else _text_of(entry.since),
        "problems": [fault._asdict() for fault in problems[:_MOST_PROBLEMS]],
    }
    line = json.dumps(values).encode() + b"\n"
    with output_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            size = os.fstat(fd).st_size
            if size and os.lseek(fd, size - 1, os.SEEK_SET) >= 0 and os.read(fd, 1) != b"\n":
                line = b"\n" + line  # the line before was cut short
            if os.write(fd, line) != len(line):
                raise OutputError("history was written in part only", path=path, hint="Free some space there.")
            os.fsync(fd)
        finally:
            os.close(fd)


def read_entries(path: Path) -> tuple[HistoryEntry, ...]:
    """Return the lines that are whole, in their order; none if there is no such file."""
    with output_errors(path):
        try:
            lines = read_regular(path).splitlines()
        except FileNotFoundError:
            return ()
    return tuple(entry for entry in map(_parse, lines) if entry is not None)


def verified_since(
    entries: Iterable[HistoryEntry], of: str, level: str, since: datetime, *, digests: bool
) -> tuple[Stretch, ...]:
    """Return the places of the set, or partition, `of` that were found sound at `level`, or above, from `since` on.

    With `digests` only what was held to its digests counts.  A verification that found anything wrong counts for
    nothing: what was repaired since is looked at again.
    """
    return tuple(
        stretch
        for entry in entries
        if entry.of == of
        and entry.faults == 0
        and entry.time >= since
        and _LEVELS.index(entry.level) >= _LEVELS.index(level)
        and (entry.digests or not digests)
        for stretch in entry.stretches
    )


def _parse(line: bytes) -> HistoryEntry | None:
    try:
        values = json.loads(line.decode())  # strictly UTF-8, which is what is written
        if values["format"] != HISTORY_FORMAT or values["format_version"] != _VERSION:
            return None
        entry = HistoryEntry(
            time=datetime.fromisoformat(values["time"]).astimezone(UTC),
            of=values["of"],
            partition=values["partition"],
            level=values["level"],
            digests=values["digests"],
            subset=values["subset"],
            since=None if values["since"] is None else datetime.fromisoformat(values["since"]).astimezone(UTC),
            stretches=tuple(Stretch(int(start), int(stop)) for start, stop in values["stretches"]),
            chunks=int(values["chunks"]),
            bytes=int(values["bytes"]),
            faults=int(values["faults"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    return entry if entry.level in _LEVELS and isinstance(entry.digests, bool) else None


def _text_of(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds")
