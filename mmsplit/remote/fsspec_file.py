"""Byte ranges of files that fsspec reaches: s3, gcs, azure, memory …, with the user's own fsspec packages.

The Hub and plain HTTP addresses do not come through here: fsspec's file system for the Hub fetches a whole file for
each range, and `HttpFile` survives more than fsspec's for HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from mmsplit.errors import (
    AccessDeniedError,
    MissingExtraError,
    MmsplitError,
    NetworkError,
    RemoteNotFoundError,
    RequestError,
    SourceChangedError,
)
from mmsplit.remote.patience import Attempts, Clock, Limits, TransferInterrupted
from mmsplit.remote.redaction import without_secrets
from mmsplit.remote.remote_file import GoOn, RemoteFile, never_stop
from mmsplit.remote.transfer_log import Traffic

_BLOCK_BYTES: Final = 8 << 20
_NOT_FOR_FSSPEC: Final = ("hf", "http", "https", "file", "local")


class FsspecFile(RemoteFile):
    """A file at an fsspec address such as `s3://bucket/folder/file`.

    Credentials are found by the fsspec package itself (its variables and files).  Raises `MissingExtraError` where the
    package for the protocol is not installed, and `NetworkError` where the file cannot be looked at.  A file that
    changes while it is read is noticed by its size only; whoever needs more compares digests.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        traffic: Traffic | None = None,
        limits: Limits | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._location = without_secrets(url)
        self._name = self._location.rpartition("/")[2] if name is None else name
        self._traffic = traffic or Traffic()
        self._limits = limits or Limits()
        self._clock = clock or Clock()
        self._files, self._path = _open_file_system(url, self._location)
        self._size = self._ask_size()

    @property
    def name(self) -> str:
        """The file's name within its source."""
        return self._name

    @property
    def location(self) -> str:
        """Where it lies, for messages."""
        return self._location

    @property
    def size_bytes(self) -> int:
        """The file's length when it was opened."""
        return self._size

    def stream(self, start: int, stop: int, go_on: GoOn = never_stop) -> Iterator[bytes]:
        """Yield exactly the bytes of [start, stop) in blocks of up to 8 MiB, each asked for again if it fails."""
        self._check_range(start, stop)
        attempts = self._attempts(go_on)
        position = start
        while position < stop:
            go_on()
            try:
                block = self._read_block(position, min(position + _BLOCK_BYTES, stop), go_on)
            except TransferInterrupted as interruption:
                attempts.failed(interruption, position)
                continue
            attempts.progressed()
            position += len(block)
            yield block

    def _read_block(self, start: int, stop: int, go_on: GoOn) -> bytes:
        self._traffic.requested()
        try:
            block = bytes(self._files.cat_file(self._path, start=start, end=stop))
        except Exception as error:
            raise self._meaning_of(error) from None
        self._traffic.received(len(block), skipped_bytes=max(0, len(block) - (stop - start)))
        if len(block) > stop - start:
            raise NetworkError("the fsspec package gives other bytes than asked for", path=self._location, offset=start)
        if len(block) < stop - start:
            size = self._ask_size(go_on)
            if size != self._size:
                raise SourceChangedError(
                    "the file on the server is not the one it was: another size",
                    path=self._location,
                    expected=self._size,
                    found=size,
                )
            raise TransferInterrupted("fewer bytes came than asked for")
        return block

    def _ask_size(self, go_on: GoOn = never_stop) -> int:
        attempts = self._attempts(go_on)
        while True:
            go_on()
            try:
                info = self._ask_info()
            except TransferInterrupted as interruption:
                attempts.failed(interruption)
                continue
            size = info.get("size")
            if info.get("type") != "file" or type(size) is not int:
                raise RemoteNotFoundError("not a file", path=self._location, found=str(info.get("type")))
            return size

    def _ask_info(self) -> dict[str, Any]:
        self._traffic.requested()
        try:
            self._files.invalidate_cache()  # some packages remember what they once listed
            return dict(self._files.info(self._path))
        except Exception as error:
            raise self._meaning_of(error) from None

    def _attempts(self, go_on: GoOn) -> Attempts:
        return Attempts(self._location, self._limits, self._clock, self._traffic, go_on)

    def _meaning_of(self, error: Exception) -> MmsplitError | TransferInterrupted:
        """Judge an exception of a package that may raise anything: what is not plain may be mended."""
        if isinstance(error, (FileNotFoundError, IsADirectoryError)):
            return RemoteNotFoundError("no such file", path=self._location, hint="Check the address.")
        said = without_secrets(f"{type(error).__name__}: {error}")[:300]
        if isinstance(error, PermissionError):
            return AccessDeniedError(
                f"access is denied ({said})", path=self._location, hint="Check the credentials of the fsspec package."
            )
        if isinstance(error, ImportError):
            return _missing_package(self._location, said)
        if isinstance(error, (TypeError, AttributeError, NotImplementedError)):
            return NetworkError(f"the fsspec package cannot do it ({said})", path=self._location)
        return TransferInterrupted(f"the transfer failed ({said})")


def _open_file_system(url: str, location: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the path in it."""
    refusal = RequestError("not an address for fsspec", path=location, hint="Give one such as s3://bucket/folder.")
    protocol, separator, _ = url.partition("://")
    if not separator or protocol.lower() in _NOT_FOR_FSSPEC:
        raise refusal
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        files, path = url_to_fs(url)
    except ImportError as error:
        raise _missing_package(location, without_secrets(str(error))[:300]) from None
    except ValueError as error:
        said = without_secrets(str(error))[:300]
        raise RequestError(
            f"fsspec cannot use this address ({said})",
            path=location,
            hint="Check the part before ://, and that the fsspec package for it is installed.",
        ) from None
    except Exception as error:  # a package's own constructor: credentials, endpoints
        said = without_secrets(f"{type(error).__name__}: {error}")[:300]
        raise NetworkError(f"the fsspec package cannot be set up ({said})", path=location) from None
    protocols = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    if not set(protocols).isdisjoint(_NOT_FOR_FSSPEC):  # fsspec takes one letter before :// for a drive of this machine
        raise refusal
    return files, path


def _missing_package(location: str, said: str) -> MissingExtraError:
    return MissingExtraError(
        f"a package that fsspec needs for this address is missing ({said})",
        path=location,
        hint="Install it beside mmsplit: s3fs for s3://, gcsfs for gs://, adlfs for az:// …",
    )
