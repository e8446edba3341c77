"""What the network does wrong, in mmsplit's errors: which one, what to do, and no secret."""

from __future__ import annotations

import socket
import threading
import traceback
from collections.abc import Callable, Iterator

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import httpx
from loopback_fixtures import FakeClock, use_endpoint
from loopback_hub import MEMBER_TOKEN, OUTSIDER_TOKEN, Fault, LoopbackHub

from mmsplit.errors import (
    AccessDeniedError,
    MissingExtraError,
    MmsplitError,
    NetworkError,
    OfflineError,
    RemoteNotFoundError,
)
from mmsplit.remote.failures import ask_hub, ask_url, judge_client_settings, judge_status, network_errors, proxy_of
from mmsplit.remote.http_client import HttpClient
from mmsplit.remote.http_file import HttpFile
from mmsplit.remote.patience import TransferInterrupted
from mmsplit.remote.repository import open_repository

SIGNED = "https://cdn.example/blob?X-Amz-Signature=s3cret"
ASKED = ask_hub("https://hub.example", "org/name", "main")
REQUEST = httpx.Request("GET", SIGNED)


def http_error(kind: type[Exception] = hub_errors.HfHubHTTPError, status: int = 500, **headers: str) -> Exception:
    """An error of huggingface_hub as it makes them."""
    response = httpx.Response(
        status, headers={name.replace("_", "-"): value for name, value in headers.items()}, request=REQUEST
    )
    return kind(f"{status} for url {SIGNED}", response=response)  # type: ignore[call-arg]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


ERRORS: dict[str, tuple[Exception, type[MmsplitError], str]] = {
    "gated": (
        http_error(hub_errors.GatedRepoError, 403, x_error_code="GatedRepo"),
        AccessDeniedError,
        "Accept it at https://hub.example/org/name",
    ),
    "missing": (
        http_error(hub_errors.RepositoryNotFoundError, 401, x_error_code="RepoNotFound"),
        RemoteNotFoundError,
        "no such repository on hub.example",
    ),
    "missing, without a code": (
        http_error(hub_errors.RepositoryNotFoundError, 401),
        RemoteNotFoundError,
        "private one",
    ),
    "revision": (
        http_error(hub_errors.RevisionNotFoundError, 404, x_error_code="RevisionNotFound"),
        RemoteNotFoundError,
        "no revision 'main'",
    ),
    "entry": (
        http_error(hub_errors.RemoteEntryNotFoundError, 404, x_error_code="EntryNotFound"),
        RemoteNotFoundError,
        "no such file in this revision",
    ),
    "disabled": (
        http_error(hub_errors.DisabledRepoError, 403, x_error_message="Access to this resource is disabled."),
        AccessDeniedError,
        "disabled",
    ),
    "forbidden": (http_error(status=403, x_error_message="no rights"), AccessDeniedError, "'no rights'"),
    "rate limit": (http_error(status=429, retry_after="99"), NetworkError, "again after 99 seconds"),
    "broken": (http_error(status=500), NetworkError, "hub.example answered 500"),
    "odd": (http_error(status=418, x_error_message="tea\x1b[2J"), NetworkError, "answered 418: 'tea [2J'"),
    "proxy wants a login": (http_error(status=407), NetworkError, "HTTPS_PROXY"),
    "offline": (
        hub_errors.OfflineModeIsEnabled(f"Cannot reach {SIGNED}"),
        OfflineError,
        "Unset HF_HUB_OFFLINE",
    ),
    "not cached for lack of a connection": (
        caused(hub_errors.LocalEntryNotFoundError("x"), httpx.ConnectError("refused", request=REQUEST)),
        NetworkError,
        "cannot be reached",
    ),
    "not cached for a refusal": (
        caused(
            hub_errors.LocalEntryNotFoundError("x"),
            http_error(hub_errors.GatedRepoError, 401, x_error_code="GatedRepo"),
        ),
        AccessDeniedError,
        "gated",
    ),
    "not cached": (hub_errors.LocalEntryNotFoundError("nothing there"), NetworkError, "nothing there"),
    "no connection": (httpx.ConnectError("[Errno -2] Name or service not known"), NetworkError, "HF_ENDPOINT"),
    "certificate": (
        httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"),
        NetworkError,
        "SSL_CERT_FILE",
    ),
    "proxy": (httpx.ProxyError("403 Forbidden"), NetworkError, "refuses to connect to hub.example: 403 Forbidden"),
    "proxy is busy": (httpx.ProxyError("503 Busy"), NetworkError, "proxy to hub.example answered 503 Busy"),
    "silence": (httpx.ReadTimeout("timed out"), NetworkError, "silent"),
    "reset": (httpx.ReadError("[Errno 104] Connection reset by peer"), NetworkError, "broke ([Errno 104]"),
    "reset without words": (httpx.ReadError(""), NetworkError, "broke (ReadError)"),
    "bad header": (
        httpx.LocalProtocolError(f"Illegal header value b'Bearer {MEMBER_TOKEN}\\n'"),
        NetworkError,
        "HF_TOKEN",
    ),
    "bad address": (httpx.InvalidURL("Invalid port: 'x'"), NetworkError, "cannot be asked"),
    "closed": (RuntimeError("Cannot send a request, as the client has been closed."), NetworkError, "were closed"),
    "metadata": (hub_errors.FileMetadataError(f"no size at {SIGNED}"), NetworkError, "HF_ENDPOINT"),
    "login": (hub_errors.LocalTokenNotFoundError("no token found"), NetworkError, "HF_TOKEN"),
}


@pytest.mark.parametrize(("error", "kind", "part"), ERRORS.values(), ids=ERRORS)
def test_errors_of_the_client_become_ours(error: Exception, kind: type[MmsplitError], part: str) -> None:
    """Each says what to do; not even its traceback holds a secret."""
    with pytest.raises(MmsplitError) as caught, network_errors(ASKED, token=MEMBER_TOKEN):
        raise error
    assert type(caught.value) is kind
    assert part in str(caught.value)
    told = "".join(traceback.format_exception(caught.value))
    assert "s3cret" not in told
    assert MEMBER_TOKEN not in told
    assert not any(c in str(caught.value) for c in "\x1b\n")


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("x"), OSError("x"), KeyboardInterrupt(), NetworkError("x")]
)
def test_other_errors_pass(error: BaseException) -> None:
    """They are not the network's."""
    with pytest.raises(type(error)) as caught, network_errors(ASKED):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("status", [400, 405, 451, 501, 505])
def test_statuses_that_no_attempt_mends_are_final(status: int) -> None:
    """On the Hub and elsewhere."""
    for asked in (ASKED, ask_url(SIGNED)):
        assert type(judge_status(status, {}, asked, "h", now=0.0)) is NetworkError


def test_a_saying_of_the_server_is_cut_and_cleaned() -> None:
    """It goes to a terminal."""
    said = judge_status(400, {"x-error-message": "x" * 400 + MEMBER_TOKEN}, ASKED, "h", now=0.0)
    assert "x" * 300 + "…" in str(said)
    assert "x" * 301 not in str(said)
    said = judge_status(400, {"x-error-message": f"bad token {OUTSIDER_TOKEN}, see {SIGNED}"}, ASKED, "h", now=0.0)
    assert "'bad token …, see https://cdn.example/blob'" in str(said)


def test_huggingface_hub_itself_fails_in_our_words(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own client against the loopback Hub, for what is left to it."""
    use_endpoint(monkeypatch, hub.endpoint)
    asked = ask_hub(hub.endpoint, "org/gated", "main")
    attempts: dict[Callable[[], object], type[MmsplitError]] = {
        lambda: huggingface_hub.hf_hub_download("org/gated", "config.json"): AccessDeniedError,
        lambda: huggingface_hub.hf_hub_download("org/nothing", "config.json"): RemoteNotFoundError,
        lambda: huggingface_hub.hf_hub_download("org/model", "nothing.json"): RemoteNotFoundError,
        lambda: huggingface_hub.HfApi().model_info("org/model", token="hf_nobody" + "x" * 30): AccessDeniedError,
        lambda: huggingface_hub.snapshot_download("org/model", local_files_only=True): NetworkError,
    }
    for attempt, kind in attempts.items():
        with pytest.raises(kind), network_errors(asked):
            attempt()


# --- no network, and proxies ------------------------------------------------------------------------------------------


@pytest.fixture
def dead_port() -> int:
    """A port of loopback where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture
def refusing_proxy() -> Iterator[str]:
    """A proxy that wants a login of whoever comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    while connection.recv(65536)[-4:] not in (b"\r\n\r\n", b""):
                        pass
                    connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_host_that_never_answered_is_given_up_soon(dead_port: int, fake_clock: FakeClock) -> None:
    """It is a wrong name or no network, rather than a bad moment."""
    with pytest.raises(NetworkError) as caught:
        open_repository("org/name", endpoint=f"http://127.0.0.1:{dead_port}", clock=fake_clock.clock())
    message = str(caught.value)
    assert f"127.0.0.1:{dead_port} cannot be reached: " in message
    assert "HF_ENDPOINT" in message
    assert "set HTTPS_PROXY" in message
    assert sum(fake_clock.pauses) == pytest.approx(0.25 + 0.5)


def test_a_host_that_has_answered_is_waited_for(hub: LoopbackHub, fake_clock: FakeClock) -> None:
    """A server may be started again."""
    file = HttpFile(HttpClient(clock=fake_clock.clock()), hub.static_url("model.bin"))
    file.read(0, 10)
    hub.__exit__(None, None, None)
    huggingface_hub.close_session()
    with pytest.raises(NetworkError, match="cannot be reached"):
        file.read(0, 10)
    assert sum(fake_clock.pauses) > 10


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_is_named(
    refusing_proxy: str, scheme: str, monkeypatch: pytest.MonkeyPatch, fake_clock: FakeClock
) -> None:
    """Without its user and password, and at once."""
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://user:pa55word@{refusing_proxy}")
    huggingface_hub.close_session()
    with pytest.raises(NetworkError) as caught:
        open_repository("org/name", endpoint=f"{scheme}://hub.invalid", clock=fake_clock.clock())
    message = str(caught.value)
    assert f"the proxy {refusing_proxy} refuses to connect to hub.invalid: 407" in message
    assert "HTTPS_PROXY" in message
    assert "pa55word" not in "".join(traceback.format_exception(caught.value))
    assert fake_clock.pauses == []


def test_a_proxy_that_is_not_there_is_named(
    dead_port: int, monkeypatch: pytest.MonkeyPatch, fake_clock: FakeClock
) -> None:
    """The host may be well."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:pa55word@127.0.0.1:{dead_port}")
    huggingface_hub.close_session()
    with pytest.raises(NetworkError) as caught:
        open_repository("org/name", endpoint="https://hub.invalid", clock=fake_clock.clock())
    assert f"hub.invalid cannot be reached through the proxy 127.0.0.1:{dead_port}: " in str(caught.value)
    assert "pa55word" not in str(caught.value)


def test_no_proxy_is_obeyed(hub: LoopbackHub, dead_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback through a proxy would not work."""
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{dead_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    assert len(open_repository("org/model", endpoint=hub.endpoint).files) == 4
    assert proxy_of(hub.endpoint) is None
    assert proxy_of("http://elsewhere.example/x") == f"127.0.0.1:{dead_port}"
    assert proxy_of("https://elsewhere.example/x") is None
    monkeypatch.setenv("ALL_PROXY", "socks5://user:pa55word@socks.example:1080")
    assert proxy_of("https://elsewhere.example/x") == "socks.example:1080"


def test_a_proxy_setting_that_cannot_be_used_is_named(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client cannot even be made; its own message holds the password."""
    monkeypatch.setenv("HTTP_PROXY", "ftp://user:pa55word@proxy:1")
    huggingface_hub.close_session()
    with pytest.raises(NetworkError, match="HTTP_PROXY") as caught:
        open_repository("org/model", endpoint=hub.endpoint)
    assert "pa55word" not in "".join(traceback.format_exception(caught.value))


def test_a_socks_proxy_names_the_package_that_it_needs() -> None:
    """And another error in the making of the client is nobody's setting."""
    assert type(judge_client_settings(ImportError("Using SOCKS proxy, but …"))) is MissingExtraError
    assert judge_client_settings(KeyError("x")) is None


def test_connections_that_others_closed_are_made_again(
    hub: LoopbackHub, fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub closes the session of the whole process when one of its requests cannot connect."""
    file = open_repository("org/model", endpoint=hub.endpoint, clock=fake_clock.clock()).open_file("model.safetensors")
    closed = huggingface_hub.get_session()
    huggingface_hub.close_session()
    sessions = [closed, closed]
    ask = huggingface_hub.get_session
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: sessions.pop() if sessions else ask())
    assert len(file.read(0, 10)) == 10
    assert file._client.traffic.snapshot().retry_count == 2


def test_the_secrets_of_a_request_are_in_no_error_whatever_breaks(hub: LoopbackHub, fake_clock: FakeClock) -> None:
    """Token and signature, through every fault that lasts."""
    for fault in (
        *(Fault("status", "cdn *", -1, status=status) for status in (302, 400, 403, 416, 429, 500)),
        *(Fault("drop", "cdn *", -1), Fault("reset", "cdn *", -1), Fault("short", "cdn *", -1)),
        Fault("wrong_range", "cdn *", -1),
        Fault("status", "hub *", -1, status=400, headers={"X-Error-Message": f"bad: {MEMBER_TOKEN}"}),
    ):
        hub.clear()
        file = open_repository(
            "org/private", token=MEMBER_TOKEN, endpoint=hub.endpoint, clock=fake_clock.clock()
        ).open_file("model.safetensors")
        hub.faults.append(fault)
        with pytest.raises(MmsplitError) as caught:
            file.read(0, 100)
        told = "".join(traceback.format_exception(caught.value))
        assert MEMBER_TOKEN not in told
        assert "Signature" not in told
        assert "During handling" not in told
        assert str(caught.value).startswith("org/private@")


def test_a_token_that_cannot_be_sent_is_not_told(hub: LoopbackHub) -> None:
    """A line end within: the client refuses it, and repeats it."""
    token = "\n".join(("swordfish", "second"))  # a traceback shows this line
    with pytest.raises(NetworkError, match="HF_TOKEN") as caught:
        open_repository("org/model", token=token, endpoint=hub.endpoint)
    assert "ordfish" not in "".join(traceback.format_exception_only(caught.value))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert hub.requests == []


def test_what_might_be_mended_says_so() -> None:
    """To those who count attempts."""
    assert isinstance(judge_status(503, {"retry-after": "3"}, ASKED, "h", now=0.0), TransferInterrupted)
