"""What went wrong on the network, in mmsplit's own errors: each says what to do, and none holds a secret.

Strategy.  One function judges a status and its headers, another an exception of the client library; both answer with
the error to raise, or with a `TransferInterrupted` where another attempt may help.  What a server or a library says
passes through `without_secrets` before it gets into a message, and the library's exceptions are not kept as causes,
since their text holds signed addresses.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from mmsplit.errors import (
    AccessDeniedError,
    MissingExtraError,
    MmsplitError,
    NetworkError,
    OfflineError,
    RemoteNotFoundError,
)
from mmsplit.remote.patience import TransferInterrupted, parse_retry_after
from mmsplit.remote.redaction import without_secrets

_LOG_IN: Final = "log in with `hf auth login` or set HF_TOKEN"
_LONGEST_SAYING: Final = 300
#: The Hub's own header, when nothing is left of what may be asked: seconds until there is again.
_RATE_LIMIT_SPENT: Final = re.compile(r'"\w+"\s*;\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,6})\b')
#: Errors that only some of the supported versions of huggingface_hub have.
_OTHER_HUB_ERRORS: Final = (
    "FileMetadataError",
    "RevisionResolutionError",
    "LocalTokenNotFoundError",
    "OIDCError",
    "DeviceCodeError",
    "CorruptedCacheException",
)


class Asked(NamedTuple):
    """What was asked for, as far as messages need it; holds no secrets.

    `place` is the thing itself, such as "org/name@main/model.safetensors" or an address without its query.
    """

    place: str
    endpoint: str | None = None
    repo_id: str | None = None
    revision: str | None = None

    @property
    def page(self) -> str | None:
        """The repository's page for people."""
        return f"{self.endpoint}/{self.repo_id}" if self.repo_id else None


def ask_hub(endpoint: str, repo_id: str, revision: str | None = None, name: str | None = None) -> Asked:
    """Describe a repository on the Hub, at a revision, or one file of it."""
    place = repo_id + (f"@{revision}" if revision else "") + (f"/{name}" if name else "")
    return Asked(place, without_secrets(endpoint), repo_id, revision)


def ask_url(url: str) -> Asked:
    """Describe a file by its address."""
    return Asked(without_secrets(url))


@contextmanager
def network_errors(asked: Asked, *, token: str | None = None) -> Iterator[None]:
    """Turn whatever huggingface_hub or its HTTP client raises within into mmsplit's errors.

    For calls into huggingface_hub, which has done its own retrying: what might be mended is final here.  `token` is
    the one in use, never to be repeated.
    """
    try:
        yield
    except MmsplitError:
        raise
    except Exception as error:
        meaning = judge_error(error, asked, token=token)
        if meaning is None:
            raise
        if isinstance(meaning, TransferInterrupted):
            meaning = _final(meaning, asked)
        raise meaning from None  # the cause would bring signed addresses into a traceback


def _final(interruption: TransferInterrupted, asked: Asked) -> NetworkError:
    pause = interruption.retry_after_seconds
    after = f" after {pause:,.0f} seconds" if pause else ""
    return interruption.final_error or NetworkError(
        interruption.reason, path=asked.place, hint=f"Run the same command again{after}."
    )


def judge_status(
    status: int, headers: Mapping[str, str], asked: Asked, host: str, *, now: float, token: str | None = None
) -> NetworkError | TransferInterrupted:
    """Return what an answer of 400 or above from `host` means.  `headers` are asked for in lower case.

    `now` is the time in seconds since the epoch.
    """
    saying = _shortened(headers.get("x-error-message", ""), token)
    if status == 407:
        return _proxy_refused(asked, host, "407 Proxy Authentication Required")
    if status == 429:
        pause = parse_retry_after(headers.get("retry-after"), now)
        if pause is None and (spent := _RATE_LIMIT_SPENT.search(headers.get("ratelimit", ""))):
            pause = float(spent[1])
        return TransferInterrupted(f"{host} limits how often it may be asked (429)", retry_after_seconds=pause)
    if status == 408 or (status >= 500 and status not in (501, 505)):
        pause = parse_retry_after(headers.get("retry-after"), now)
        return TransferInterrupted(f"{host} answered {status}", retry_after_seconds=pause)
    if asked.repo_id is not None:
        return _judge_hub_status(status, headers.get("x-error-code"), saying, asked, host)
    if status in (401, 403):
        return AccessDeniedError(
            f"{host} does not allow it ({status})",
            path=asked.place,
            hint="Check the address: a signed one may have expired. The Hub's token is sent to the Hub only.",
        )
    if status in (404, 410):
        return RemoteNotFoundError(f"{host} has no such file ({status})", path=asked.place, hint="Check the address.")
    return _unexpected(status, saying, asked, host)


def _judge_hub_status(status: int, code: str | None, saying: str, asked: Asked, host: str) -> NetworkError:
    if code == "GatedRepo":
        not_yet = " The token in use has not been granted it." if status == 403 else ""
        return AccessDeniedError(
            "gated: its authors grant access to those who accept the licence",
            path=asked.place,
            hint=f"Accept it at {asked.page} and {_LOG_IN} of that account.{not_yet}",
        )
    if code == "RevisionNotFound":
        return RemoteNotFoundError(
            f"no revision {asked.revision!r}",
            path=asked.repo_id,
            hint=f"Give a branch, tag or commit that is listed at {asked.page}/tree/main, or none at all.",
        )
    if code == "EntryNotFound":
        return RemoteNotFoundError(
            "no such file in this revision", path=asked.place, hint=f"See {asked.page}/tree/{asked.revision or 'main'}."
        )
    if saying == "Access to this resource is disabled.":
        return AccessDeniedError("disabled by the Hub or its authors", path=asked.place, hint=f"See {asked.page}.")
    if status == 401 and saying.startswith("Invalid credentials"):
        return AccessDeniedError(
            f"{host} does not accept the token",
            path=asked.place,
            hint=f"Make a new one at {asked.endpoint}/settings/tokens and {_LOG_IN}. "
            "A public repository needs none: unset HF_TOKEN, or `hf auth logout`.",
        )
    if code == "RepoNotFound" or status == 401:
        return RemoteNotFoundError(
            f"no such repository on {host}, or a private one",
            path=asked.repo_id,
            hint=f"Check the name at {asked.page}; to see a private one, {_LOG_IN}.",
        )
    if status == 403:
        return AccessDeniedError(
            f"{host} does not allow it (403){_quoted(saying)}",
            path=asked.place,
            hint="A fine-grained token must have the right to read this repository; a proxy or firewall may also "
            "be what answers.",
        )
    if status in (404, 410):
        return RemoteNotFoundError(
            f"{host} has no such thing ({status})", path=asked.place, hint="Check the name, and HF_ENDPOINT if set."
        )
    return _unexpected(status, saying, asked, host)


def judge_error(
    error: Exception, asked: Asked, host: str | None = None, *, token: str | None = None
) -> MmsplitError | TransferInterrupted | None:
    """Return what an exception of huggingface_hub or of its HTTP client means; None for one that is not theirs.

    `host` is the one that was asked; without it, that of `asked`.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    host = host or host_of(asked.endpoint or asked.place)
    said = _shortened(str(error), token)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return offline_error(asked)
    if isinstance(error, hub.HfHubHTTPError):
        answer = error.response
        return judge_status(answer.status_code, answer.headers, asked, host, now=time.time(), token=token)
    if isinstance(error, hub.LocalEntryNotFoundError):  # nothing cached, and the cause says why nothing was fetched
        cause = error.__cause__
        deeper = judge_error(cause, asked, host, token=token) if isinstance(cause, Exception) else None
        return deeper or (offline_error(asked) if is_offline() else _unreachable(asked, host, said))
    if isinstance(error, (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL)):
        return _judge_client_error(error, asked, host, said)
    if isinstance(error, RuntimeError) and "client has been closed" in said:
        # huggingface_hub closes the session of the whole process after a failure to connect.
        return TransferInterrupted("the connections of this process were closed")
    if isinstance(error, hub.EntryNotFoundError):
        return RemoteNotFoundError(said or "no such file", path=asked.place)
    others = tuple(getattr(hub, name) for name in _OTHER_HUB_ERRORS if hasattr(hub, name))
    if isinstance(error, others):
        return NetworkError(said, path=asked.place, hint="Check HF_ENDPOINT, HF_TOKEN and the proxy; then run again.")
    return None


def _judge_client_error(error: Exception, asked: Asked, host: str, said: str) -> NetworkError | TransferInterrupted:
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, httpx.ProxyError):
        if re.match(r"5\d\d\b", said):
            return TransferInterrupted(f"the proxy to {host} answered {said}")
        return _proxy_refused(asked, host, said)
    if isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in said:
        return NetworkError(
            f"the certificate of {host} is not trusted: {said}",
            path=asked.place,
            hint="Behind a proxy that looks into traffic, set SSL_CERT_FILE to its certificate.",
        )
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError)):
        return NetworkError(
            f"{host} cannot be asked: {said}", path=asked.place, hint="Check the address, HF_ENDPOINT and HF_TOKEN."
        )
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return TransferInterrupted(f"{host} cannot be reached", final_error=_unreachable(asked, host, said))
    if isinstance(error, httpx.TimeoutException):
        return TransferInterrupted(f"{host} was silent for too long")
    return TransferInterrupted(f"the connection to {host} broke ({said or type(error).__name__})")


def judge_client_settings(error: Exception) -> MmsplitError | None:
    """Return what it means that the HTTP client could not even be made; None if that is nobody's setting."""
    said = _shortened(str(error))
    if isinstance(error, ImportError):
        return MissingExtraError(said, hint="HTTPS_PROXY or ALL_PROXY names a SOCKS proxy: `pip install socksio`.")
    if isinstance(error, (ValueError, OSError)):
        return NetworkError(said, hint="Check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE.")
    return None


def offline_error(asked: Asked) -> OfflineError:
    """Return the error for a need of the network that HF_HUB_OFFLINE forbids."""
    return OfflineError(
        "the network is needed and HF_HUB_OFFLINE forbids it",
        path=asked.place,
        hint="Unset HF_HUB_OFFLINE, or download the model before.",
    )


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE was set when huggingface_hub was imported."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def host_of(url: str) -> str:
    """Return host and port of an address, without user and password."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2] or without_secrets(url)
    except ValueError:  # no address; the client will say so
        return without_secrets(url)


def proxy_of(url: str) -> str | None:
    """Return host and port of the proxy that the environment sets for an address; None for a direct connection."""
    from urllib.request import getproxies, proxy_bypass  # slow to import, and needed for errors only

    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or (parts.hostname and proxy_bypass(parts.hostname)):
        return None
    return host_of(proxy if "://" in proxy else f"http://{proxy}")


def _proxy_refused(asked: Asked, host: str, said: str) -> NetworkError:
    proxy = proxy_of(asked.endpoint or asked.place)
    return NetworkError(
        f"the proxy{f' {proxy}' if proxy else ''} refuses to connect to {host}: {said}",
        path=asked.place,
        hint="Check HTTPS_PROXY, with its user and password; NO_PROXY names hosts to be reached without it.",
    )


def _unreachable(asked: Asked, host: str, said: str) -> NetworkError:
    proxy = proxy_of(asked.endpoint or asked.place)
    mirror = ", and HF_ENDPOINT if set" if asked.repo_id else ""
    return NetworkError(
        f"{host} cannot be reached{f' through the proxy {proxy}' if proxy else ''}: {said}",
        path=asked.place,
        hint=f"Check the network{' and HTTPS_PROXY' if proxy else ' (behind a proxy, set HTTPS_PROXY)'}{mirror}.",
    )


def _unexpected(status: int, saying: str, asked: Asked, host: str) -> NetworkError:
    return NetworkError(f"{host} answered {status}{_quoted(saying)}", path=asked.place)


def _quoted(saying: str) -> str:
    return f": {saying!r}" if saying else ""


def _shortened(text: str, token: str | None = None) -> str:
    text = without_secrets(text, token)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _LONGEST_SAYING else f"{text[:_LONGEST_SAYING]}…"
