"""What a repair did and what it could not do, collected from all threads."""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

from mmsplit.sidecar.partition_reader import Fault

#: Where something came from that needed no source.
THE_SET: Final = "the set itself"


class Mended(NamedTuple):
    """Something that was made again, or in a dry run would be: bytes [`start`, `stop`) of `file`.

    `source` is where it came from; in a dry run None where that is not known before it is tried.
    """

    file: str
    what: str
    source: str | None
    start: int | None = None
    stop: int | None = None
    partition: int | None = None
    tensor: str | None = None


class Ledger:
    """Collects what was mended and what is left; may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mended: list[Mended] = []
        self._left: list[Fault] = []

    def mend(self, mended: Mended) -> None:
        """Note that something is as it was written again."""
        with self._lock:
            self._mended.append(mended)

    def leave(self, fault: Fault) -> None:
        """Note that something is not, and why."""
        with self._lock:
            self._left.append(fault)

    def mended(self) -> tuple[Mended, ...]:
        """Return what was mended, in the order of files and bytes."""
        with self._lock:
            return tuple(sorted(self._mended, key=lambda item: (item.file, item.start or 0, item.what)))

    def left(self) -> tuple[Fault, ...]:
        """Return what is left, in the order of files and bytes."""
        with self._lock:
            return tuple(sorted(self._left, key=lambda fault: (fault.file, fault.start or 0, fault.what)))
