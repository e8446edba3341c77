"""A file of this machine, or of a disk mounted on it, in the guise of one that lies elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mmsplit.checkpoint import FileReader
from mmsplit.errors import CheckpointError, NetworkError, RemoteNotFoundError
from mmsplit.remote.remote_file import GoOn, RemoteFile, never_stop

_BLOCK_BYTES: Final = 1 << 20


class LocalFile(RemoteFile):
    """A regular file at `path`, opened for the time of each range.

    Raises `RemoteNotFoundError` where there is none, and `NetworkError` where its disk fails: it is read for those who
    copy from it, to whom it is a server like any other.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._path = path
        self._name = path.name if name is None else name
        try:
            if not path.is_file():
                raise RemoteNotFoundError("no such file", path=path)
            self._size = path.stat().st_size
        except OSError as error:
            raise self._failed(error) from error

    @property
    def name(self) -> str:
        """The file's name within its source."""
        return self._name

    @property
    def location(self) -> str:
        """Where it lies, for messages."""
        return str(self._path)

    @property
    def size_bytes(self) -> int:
        """The file's length when it was first looked at."""
        return self._size

    def stream(self, start: int, stop: int, go_on: GoOn = never_stop) -> Iterator[bytes]:
        """Yield exactly the bytes of [start, stop) in blocks of up to 1 MiB."""
        self._check_range(start, stop)
        try:
            reader = FileReader(self._path, io="pread")
        except OSError as error:
            raise self._failed(error) from error
        with reader:
            reader.will_need(start, stop)
            for position in range(start, stop, _BLOCK_BYTES):
                go_on()
                try:
                    block = reader.read(position, min(position + _BLOCK_BYTES, stop))
                except CheckpointError as error:
                    if isinstance(error.__cause__, OSError):
                        raise self._failed(error.__cause__, position) from error
                    raise
                yield block

    def _failed(self, error: OSError, offset: int | None = None) -> NetworkError:
        return NetworkError(f"cannot read: {error.strerror or error}", path=self._path, offset=offset)
