"""What every file on a server can do, however it is reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Final

from mmsplit.errors import RequestError

#: Ranges, or files, that are fetched at once unless somebody says otherwise.
DEFAULT_CONNECTIONS: Final = 8
#: Called between two blocks, and while waiting; raises to give up.
GoOn = Callable[[], None]


def never_stop() -> None:
    """The `go_on` of a caller who does not cancel."""


class RemoteFile(ABC):
    """Half-open byte ranges of one file that lies elsewhere; safe to share between threads.

    Every method that moves bytes raises `NetworkError` or `SourceChangedError`, and whatever `go_on` raises.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The file's name within its source, with / between folders."""

    @property
    @abstractmethod
    def location(self) -> str:
        """Where it lies, for messages; never holds a secret."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """The file's length.  Asks the server the first time if nobody has said it."""

    @abstractmethod
    def stream(self, start: int, stop: int, go_on: GoOn = never_stop) -> Iterator[bytes]:
        """Yield exactly the bytes of [start, stop), in order, in blocks as they arrive.

        Close the iterator to end early.
        """

    def read(self, start: int, stop: int, go_on: GoOn = never_stop) -> bytes:
        """Return the bytes of [start, stop)."""
        return b"".join(self.stream(start, stop, go_on))

    def read_into(self, start: int, buffer: memoryview, go_on: GoOn = never_stop) -> None:
        """Fill `buffer`, writable bytes that stay the caller's, from byte `start` on."""
        position = 0
        for block in self.stream(start, start + len(buffer), go_on):
            buffer[position : position + len(block)] = block
            position += len(block)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.size_bytes:
            raise RequestError(
                f"bytes {start:,} to {stop:,} are not within the file", path=self.location, expected=self.size_bytes
            )
