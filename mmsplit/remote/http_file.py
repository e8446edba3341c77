"""Byte ranges of one file behind HTTP, whatever the server and the network do meanwhile.

Strategy.  A range is asked for at the file's own address; where the redirects end is kept and asked directly from then
on, without the token, until it refuses (a signature that expired) or fails: then the way is walked again.  Whatever
ends a body early, the next request asks for the bytes from there on.  Nothing is taken on trust: a 206 must say that it
starts at the byte asked for, and of how large a file; a 200 has ignored the Range, and its head is skipped; and each
answer must be of the same file as the first.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import unquote, urlsplit

from mmsplit.errors import AccessDeniedError, NetworkError, RemoteNotFoundError, RequestError, SourceChangedError
from mmsplit.remote.failures import Asked, ask_url, host_of
from mmsplit.remote.http_client import HttpClient
from mmsplit.remote.patience import TransferInterrupted
from mmsplit.remote.redaction import without_secrets
from mmsplit.remote.remote_file import GoOn, RemoteFile, never_stop

if TYPE_CHECKING:
    import httpx2 as httpx  # what huggingface_hub 2 uses; version 1 uses httpx, which looks the same

#: What an address that was redirected to answers when its signature is over, or its object has moved.
_REFUSALS: Final = (401, 403, 404, 410)
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)
_UNSATISFIED: Final = re.compile(r"bytes \*/(\d{1,18})", re.ASCII)
#: A server that ignores Range may cost twice the file in skipped bytes, and this on top for small files.
_SKIP_ALLOWANCE_BYTES: Final = 64 << 20


class Expected(NamedTuple):
    """What is known of a file before it is asked for; None for what is not.

    `etag` and `commit` are held against what the Hub says of a file that it redirects to.
    """

    size_bytes: int | None = None
    etag: str | None = None
    commit: str | None = None


class HttpFile(RemoteFile):
    """A file at an address, on the Hub or on any HTTP server.

    `asked` names it in messages, by default its address without secrets.
    """

    def __init__(
        self,
        client: HttpClient,
        url: str,
        *,
        name: str | None = None,
        asked: Asked | None = None,
        expected: Expected | None = None,
    ) -> None:
        if not is_http_address(url):
            raise RequestError("not an HTTP address", path=without_secrets(url))
        self._client = client
        self._url = url
        self._name = unquote(urlsplit(url).path.rpartition("/")[2]) if name is None else name
        self._asked = asked or ask_url(url)
        self._expected = expected or Expected()
        self._size = self._expected.size_bytes
        self._lock = threading.Lock()
        self._address = url  # where the redirects ended the last time
        self._version: str | None = None
        self._skipped_bytes = 0

    @property
    def name(self) -> str:
        """The file's name within its source."""
        return self._name

    @property
    def location(self) -> str:
        """Where it lies, for messages."""
        return self._asked.place

    @property
    def size_bytes(self) -> int:
        """The file's length: from the listing of the repository, or else asked of the server the first time."""
        if self._size is None:
            self._size = self._client.insist(self._ask_size, self.location)
        return self._size

    def stream(self, start: int, stop: int, go_on: GoOn = never_stop) -> Iterator[bytes]:
        """Yield exactly the bytes of [start, stop), continuing from the byte reached after each failure.

        Raises `NetworkError` after `Limits.failures` attempts that brought nothing, and `SourceChangedError` when
        the server has another file now.
        """
        self._check_range(start, stop)
        attempts = self._client.attempts(self.location, go_on)
        position = failed_at = start
        while position < stop:
            try:
                for block in self._blocks(position, stop, go_on):
                    position += len(block)
                    attempts.progressed()
                    yield block
            except TransferInterrupted as interruption:
                if position == failed_at:
                    self._address = self._url  # brought nothing: the way may lead elsewhere by now
                failed_at = position
                attempts.failed(interruption, position)

    def _blocks(self, start: int, stop: int, go_on: GoOn) -> Iterator[bytes]:
        """Yield what one request brings of [start, stop): at least one byte, none left out."""
        go_on()
        with self._answer(start, stop) as response:
            to_skip = self._check_start(response, start)
            # Read on until the body says that it is over, and its connection serves the next range as well.
            ends_at_stop = response.headers.get("content-length") == str(stop - start + to_skip)
            position = start
            for block in response.iter_bytes():
                skipped = min(to_skip, len(block))
                to_skip -= skipped
                self._client.traffic.received(len(block), skipped_bytes=skipped)
                wanted = block[skipped : skipped + stop - position]
                if wanted:
                    position += len(wanted)
                    yield wanted
                if position == stop and not ends_at_stop:
                    return
                go_on()
            if position == start:
                raise TransferInterrupted(f"{_host(response)} sent nothing of what it announced")

    @contextmanager
    def _answer(self, start: int, stop: int) -> Iterator[httpx.Response]:
        """Ask for [start, stop) and lend the answer, 200 or 206, after all redirects."""
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        with self._client.get(self._address, self._asked, headers, self._check_hub_headers) as response:
            self._check_status(response)
            self._address = str(response.request.url)
            yield response

    def _check_status(self, response: httpx.Response) -> None:
        status, headers = response.status_code, response.headers
        if status == 416 and self._size is not None:
            found = _UNSATISFIED.fullmatch(headers.get("content-range", ""))
            raise self._changed("size", self._size, int(found[1]) if found else "less than asked for")
        is_redirected = response.request.url != self._url
        if is_redirected and status in _REFUSALS and "x-error-code" not in headers:
            host = _host(response)
            kind = AccessDeniedError if status in (401, 403) else RemoteNotFoundError
            raise TransferInterrupted(
                f"{host} refused an address that had been redirected to ({status})",
                retry_after_seconds=0,
                most_failures=self._client.limits.refusals,
                final_error=kind(
                    f"{host}, where {host_of(self._url)} sends for the file, refuses it ({status})",
                    path=self.location,
                    hint="Run again later; if it stays so, a proxy or firewall may be what refuses.",
                ),
            )
        self._client.check(response, self._asked)

    def _check_start(self, response: httpx.Response, start: int) -> int:
        """Hold the answer to what was asked; return how many bytes of its body come before `start`."""
        headers = response.headers
        is_encoded = _is_encoded(headers)
        if response.status_code == 206:
            if is_encoded:
                raise TransferInterrupted(f"{_host(response)} sent a part of something compressed")
            found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            if found and found[3] != "*" and int(found[3]) != self._size:
                raise self._changed("size", self._size, int(found[3]))
            if not found or int(found[1]) != start:
                raise TransferInterrupted(f"{_host(response)} sent other bytes than those from {start:,} on")
            self._check_version(headers)
            return 0
        length = None if is_encoded else _number(headers.get("content-length"))
        if length is not None and length != self._size:
            raise self._changed("size", self._size, length)
        self._check_version(headers)
        self._allow_skip(_host(response), start)
        return start

    def _allow_skip(self, host: str, count_bytes: int) -> None:
        """Count bytes that will be received for nothing; refuse where that would go on without end."""
        with self._lock:
            self._skipped_bytes += count_bytes
            if self._skipped_bytes <= _SKIP_ALLOWANCE_BYTES + 2 * (self._size or 0):
                return
        raise NetworkError(
            f"{host} sends whole files whatever bytes are asked for: each range costs all that stands before it",
            path=self.location,
            found=f"{self._skipped_bytes:,} bytes for nothing",
            hint="Download the whole file before; a proxy in between may also be what ignores ranges.",
        )

    def _check_hub_headers(self, response: httpx.Response) -> None:
        """Hold what the Hub says of the file, beside its redirect, to what its listing said."""
        headers = response.headers
        size = _number(headers.get("x-linked-size"))
        if size is not None and self._size is not None and size != self._size:
            raise self._changed("size", self._size, size)
        etag = headers.get("x-linked-etag", "").removeprefix("W/").strip('"')
        if etag and self._expected.etag and etag != self._expected.etag:
            raise self._changed("ETag", self._expected.etag, etag)
        commit = headers.get("x-repo-commit")
        if commit and self._expected.commit and commit != self._expected.commit:
            raise self._changed("commit", self._expected.commit, commit)

    def _check_version(self, headers: httpx.Headers) -> None:
        """Hold the ETag, or else the date, to that of the first answer; a commit pins a file without that."""
        if self._expected.commit is not None:
            return
        version = headers.get("etag") or headers.get("last-modified")
        with self._lock:
            self._version = self._version or version
            first = self._version
        if version and version != first:
            raise self._changed("version", first, version)

    def _ask_size(self) -> int:
        """Learn the size from the answer to a request for the first byte."""
        with self._client.get(self._url, self._asked, {"Range": "bytes=0-0"}) as response:
            headers = response.headers
            ranged = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            if response.status_code == 416 and (empty := _UNSATISFIED.fullmatch(headers.get("content-range", ""))):
                return int(empty[1])
            self._check_status(response)
            if response.status_code == 206:
                size = _number(ranged[3]) if ranged else None
            else:
                size = None if _is_encoded(headers) else _number(headers.get("content-length"))
            if size is None:
                raise NetworkError("the server does not say how large the file is", path=self.location)
            self._check_version(headers)
            self._address = str(response.request.url)
            return size

    def _changed(self, what: str, expected: object, found: object) -> SourceChangedError:
        return SourceChangedError(
            f"the file on the server is not the one it was: another {what}",
            path=self.location,
            expected=expected,
            found=found,
            hint="Run again; where the source has revisions, name a commit.",
        )


def is_http_address(url: str) -> bool:
    """Return whether `url` is an address with a host that HTTP can be spoken with."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that are no IPv6 address, a port that is no number
        return False


def _host(response: httpx.Response) -> str:
    return host_of(str(response.request.url))


def _is_encoded(headers: httpx.Headers) -> bool:
    return headers.get("content-encoding", "identity").lower() != "identity"


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 18 else None
