"""The one place that sends HTTP requests: through huggingface_hub's own session, so that its settings hold.

huggingface_hub's helpers that retry are not used: they log the addresses they ask, signatures included, sleep where
they cannot be woken, and give up at a reset.  Here every request is sent once, and whoever asks decides whether to ask
again (`Attempts`).  Redirects are followed by hand: an address that is redirected to is signed and must never see the
token, which goes to the Hub's own origins only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urljoin, urlsplit

import mmsplit
from mmsplit.errors import MmsplitError, NetworkError
from mmsplit.remote.failures import (
    Asked,
    host_of,
    is_offline,
    judge_client_settings,
    judge_error,
    judge_status,
    offline_error,
)
from mmsplit.remote.patience import Attempts, Clock, Limits, TransferInterrupted
from mmsplit.remote.remote_file import GoOn, never_stop
from mmsplit.remote.transfer_log import Traffic

if TYPE_CHECKING:
    import httpx2 as httpx  # what huggingface_hub 2 uses; version 1 uses httpx, which looks the same

T = TypeVar("T")
Origin = tuple[str, str, int]

#: Origins that may see the token whatever HF_ENDPOINT says: a mirror may redirect to the Hub itself.
_HUB_ORIGINS: Final = (("https", "huggingface.co", 443), ("https", "hf.co", 443))
_MOST_REDIRECTS: Final = 10
_MOST_JSON_BYTES: Final = 256 << 20


class HttpClient:
    """Requests of one source: its token, its counters, its patience.  Safe to share between threads.

    `endpoint` is the Hub's address; without it no token is ever sent.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        traffic: Traffic | None = None,
        limits: Limits | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.traffic = traffic or Traffic()
        self.limits = limits or Limits()
        self.clock = clock or Clock()
        self._token = token if endpoint else None
        self._token_origins = (*([_origin(endpoint)] if endpoint else []), *_HUB_ORIGINS)
        self._answering_hosts: set[str] = set()

    def __repr__(self) -> str:
        return f"HttpClient({self.traffic.snapshot()})"  # and not the token

    @contextmanager
    def get(
        self,
        url: str,
        asked: Asked,
        headers: dict[str, str],
        on_answer: Callable[[httpx.Response], None] = lambda _: None,
    ) -> Iterator[httpx.Response]:
        """Send one GET, follow its redirects, and lend the answer, whatever its status, its body not yet read.

        `on_answer` sees each answer on the way, the last included.  Raises `TransferInterrupted` or `NetworkError`
        for what the network does, also while the caller reads the body within the `with`.
        """
        for _ in range(_MOST_REDIRECTS):
            with self._send(url, asked, headers) as response:
                on_answer(response)
                if not response.has_redirect_location:
                    yield response
                    return
                url = self._redirected(url, response.headers["Location"], asked)
        raise NetworkError("redirected without end", path=asked.place, found=f"{_MOST_REDIRECTS} redirects")

    def _redirected(self, url: str, location: str, asked: Asked) -> str:
        try:
            return urljoin(url, location)
        except ValueError:
            raise NetworkError(f"{host_of(url)} redirects to what is no address", path=asked.place) from None

    def check(self, response: httpx.Response, asked: Asked) -> None:
        """Raise what an answer means that is not 200 or 206."""
        status = response.status_code
        if status in (200, 206):
            return
        host = host_of(str(response.request.url))
        if status < 400:
            raise TransferInterrupted(f"{host} answered {status}")
        raise judge_status(status, response.headers, asked, host, now=self.clock.now(), token=self._token)

    def attempts(self, where: str, go_on: GoOn = never_stop) -> Attempts:
        """Return a counter of failures for one transfer; `where` is its name in messages."""
        return Attempts(where, self.limits, self.clock, self.traffic, go_on)

    def insist(self, attempt: Callable[[], T], where: str, go_on: GoOn = never_stop) -> T:
        """Call `attempt` until it is not interrupted, and return its result."""
        attempts = self.attempts(where, go_on)
        while True:
            go_on()
            try:
                return attempt()
            except TransferInterrupted as interruption:
                attempts.failed(interruption)

    def read_json(self, url: str, asked: Asked, go_on: GoOn = never_stop) -> tuple[object, str | None]:
        """Ask for a page of JSON; return it with the address of the next page, None for the last."""
        return self.insist(lambda: self._read_json(url, asked, go_on), asked.place, go_on)

    def _read_json(self, url: str, asked: Asked, go_on: GoOn) -> tuple[object, str | None]:
        with self.get(url, asked, {"Accept": "application/json"}) as response:
            self.check(response, asked)
            body = bytearray()
            for block in response.iter_bytes():
                self.traffic.received(len(block))
                body += block
                if len(body) > _MOST_JSON_BYTES:
                    raise not_a_hub(asked, host_of(url), f"more than {_MOST_JSON_BYTES:,} bytes")
                go_on()
            try:
                return json.loads(body), response.links.get("next", {}).get("url")
            except (ValueError, RecursionError):
                raise not_a_hub(asked, host_of(url), "no JSON") from None

    @contextmanager
    def _send(self, url: str, asked: Asked, headers: dict[str, str]) -> Iterator[httpx.Response]:
        if is_offline():  # the session refuses as well, unless somebody has set a factory for it
            raise offline_error(asked)
        session = self._session()
        host = host_of(url)
        try:
            request = session.build_request("GET", url, headers=self._headers(url, headers), timeout=self._timeout())
            self.traffic.requested()
            response = session.send(request, stream=True, follow_redirects=False)
            self._answering_hosts.add(host)
            try:
                yield response
            finally:
                response.close()
        except (TransferInterrupted, MmsplitError):
            raise
        except Exception as error:
            meaning = judge_error(error, asked, host, token=self._token)
            if meaning is None:
                raise
            if isinstance(meaning, TransferInterrupted) and host not in self._answering_hosts:
                meaning.most_failures = self.limits.failures_before_contact
            raise meaning from None  # the cause would bring signed addresses into a traceback

    def _session(self) -> httpx.Client:
        """Return the session of the process; asked for every time, since anybody may have closed it."""
        from huggingface_hub import get_session

        try:
            return get_session()
        except Exception as error:
            meaning = judge_client_settings(error)
            if meaning is None:
                raise
            raise meaning from None

    def _headers(self, url: str, headers: dict[str, str]) -> dict[str, str]:
        # Compressed on the way, a range would be one of the compressed bytes.
        sent = {"User-Agent": f"mmsplit/{mmsplit.__version__}", "Accept-Encoding": "identity", **headers}
        if self._token and _origin(url) in self._token_origins:
            sent["Authorization"] = f"Bearer {self._token}"
        return sent

    def _timeout(self) -> httpx.Timeout:
        from huggingface_hub import constants
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        silence = self.limits.silence_seconds
        # To wait for a free connection of the pool is no failure of the network.
        return httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT if silence is None else silence, pool=None)


def not_a_hub(asked: Asked, host: str, found: str) -> NetworkError:
    """Return the error for an answer that the Hub would not give."""
    return NetworkError(
        f"{host} does not answer as the Hub does",
        path=asked.place,
        found=found,
        hint="Check HF_ENDPOINT if set; a proxy's login page may stand in between.",
    )


def _origin(url: str) -> Origin:
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        return parts.scheme, (parts.hostname or "").lower(), port
    except ValueError:  # no address, and no origin of anything
        return "", "", -1
