"""Byte ranges over HTTP: exact whatever the server and the network do, or one clear error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
from huggingface_hub.utils import httpx
from loopback_fixtures import WEIGHTS, FakeClock
from loopback_hub import MEMBER_TOKEN, Fault, Kind, LoopbackHub

from mmsplit.errors import AccessDeniedError, NetworkError, RemoteNotFoundError, RequestError, SourceChangedError
from mmsplit.remote.http_client import HttpClient
from mmsplit.remote.http_file import HttpFile
from mmsplit.remote.patience import Limits
from mmsplit.remote.repository import open_repository

SIZE = len(WEIGHTS)
QUICK = Limits(silence_seconds=0.3)


@pytest.fixture
def file(hub: LoopbackHub, fake_clock: FakeClock) -> HttpFile:
    """The weights of a private repository, with the requests that led to it forgotten."""
    repository = open_repository(
        "org/private", token=MEMBER_TOKEN, endpoint=hub.endpoint, clock=fake_clock.clock(), limits=QUICK
    )
    hub.clear()
    return repository.open_file("model.safetensors")


@pytest.fixture
def client(fake_clock: FakeClock) -> HttpClient:
    return HttpClient(clock=fake_clock.clock(), limits=QUICK)


RANGES = [(0, SIZE), (0, 1), (SIZE - 1, SIZE), (0, 0), (SIZE, SIZE), (123_456, 654_321)]


@pytest.mark.parametrize(("start", "stop"), RANGES)
def test_a_range_is_exact(file: HttpFile, start: int, stop: int) -> None:
    """By each of the three ways to read it."""
    assert file.read(start, stop) == WEIGHTS[start:stop]
    assert b"".join(file.stream(start, stop)) == WEIGHTS[start:stop]
    buffer = bytearray(stop - start)
    file.read_into(start, memoryview(buffer))
    assert buffer == WEIGHTS[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, SIZE + 1)])
def test_a_range_beyond_the_file_is_not_asked_for(hub: LoopbackHub, file: HttpFile, start: int, stop: int) -> None:
    """It is the caller's mistake."""
    with pytest.raises(RequestError, match="not within the file"):
        file.read(start, stop)
    assert hub.requests == []


def test_the_way_to_the_cdn_is_walked_once(hub: LoopbackHub, file: HttpFile) -> None:
    """Each further range costs one request, on a connection that is there."""
    for start in range(0, 1000, 100):
        assert file.read(start, start + 100) == WEIGHTS[start : start + 100]
    assert len(hub.requests_to("hub")) == 1
    assert len(hub.requests_to("cdn")) == 10
    assert len({request.connection for request in hub.requests_to("cdn")}) == 1
    assert all(request.headers["accept-encoding"] == "identity" for request in hub.requests)


#: Faults of one answer that the next request makes good, and how many bytes are received for nothing: those before the
#: start, where the whole file comes.
MENDED: dict[str, tuple[Kind, int, int]] = {
    "dropped at once": ("drop", 0, 0),
    "dropped within": ("drop", 300_000, 0),
    "reset at once": ("reset", 0, 0),
    "reset within": ("reset", 300_000, 0),
    "silent at once": ("stall", 0, 0),
    "silent within": ("stall", 300_000, 0),
    "short": ("short", 300_000, 0),
    "empty": ("short", 0, 0),
    "another range": ("wrong_range", 0, 0),
    "ignored range": ("ignore_range", 0, 50_000),
    "compressed": ("gzip", 0, 50_000),
    "compressed range": ("gzip_range", 0, 0),
    "no length": ("no_length", 0, 50_000),
}


@pytest.mark.parametrize(("kind", "after_bytes", "in_vain_bytes"), MENDED.values(), ids=MENDED)
@pytest.mark.parametrize("start", [0, 50_000])
def test_a_bad_answer_is_made_good(
    hub: LoopbackHub, file: HttpFile, kind: Kind, after_bytes: int, in_vain_bytes: int, start: int
) -> None:
    """The bytes are exact, and those that had arrived are not fetched again."""
    traffic = file._client.traffic
    before = traffic.snapshot()
    hub.faults.append(Fault(kind, "cdn GET *", after_bytes=after_bytes))
    assert file.read(start, SIZE) == WEIGHTS[start:]
    after = traffic.snapshot()
    in_vain = min(in_vain_bytes, start)
    assert after.received_bytes - before.received_bytes == SIZE - start + in_vain
    assert after.skipped_bytes - before.skipped_bytes == in_vain


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504, 520, 429])
@pytest.mark.parametrize("server", ["hub", "cdn"])
def test_a_server_that_is_busy_is_asked_again(
    hub: LoopbackHub, file: HttpFile, fake_clock: FakeClock, server: str, status: int
) -> None:
    """After pauses that grow."""
    hub.faults.append(Fault("status", f"{server} GET *", times=3, status=status))
    assert file.read(0, SIZE) == WEIGHTS
    assert sum(fake_clock.pauses) == pytest.approx(0.25 + 0.5 + 1.0)


def test_many_drops_are_no_reason_to_give_up_as_long_as_bytes_arrive(hub: LoopbackHub, file: HttpFile) -> None:
    """Failures are counted since the last progress."""
    hub.faults.append(Fault("drop", "cdn GET *", times=50, after_bytes=10_000))
    assert file.read(0, SIZE) == WEIGHTS
    assert file._client.traffic.snapshot().retry_count == 50
    ranges = [request.range for request in hub.requests_to("cdn")]
    assert ranges[:2] == [f"bytes=0-{SIZE - 1}", f"bytes=10000-{SIZE - 1}"]


def test_it_gives_up_with_one_error_that_says_all(hub: LoopbackHub, file: HttpFile, fake_clock: FakeClock) -> None:
    """Host, file, byte reached, the last reason, and that running again continues; the token never."""
    hub.faults += [
        Fault("drop", "cdn GET *", after_bytes=300_000),
        Fault("status", "cdn GET *", times=-1, status=503),
    ]
    with pytest.raises(NetworkError) as caught:
        file.read(0, SIZE)
    message = str(caught.value)
    host = hub.cdn_endpoint.removeprefix("http://")
    assert message.startswith("org/private@")
    assert "/model.safetensors, byte 300,000: " in message
    assert f"{host} answered 503; gave up after 8 attempts" in message
    assert "continues" in message
    assert (caught.value.offset, caught.value.__cause__) == (300_000, None)
    assert "Signature" not in message
    assert sum(fake_clock.pauses) < 60


RETRY_AFTER = {"7": 7.0, "Fri, 15 Jan 2027 08:02:00 GMT": 120.0, "Fri, 15 Jan 2027 07:00:00 GMT": 0.0, "soon": 0.25}


@pytest.mark.parametrize(("value", "seconds"), RETRY_AFTER.items())
def test_retry_after_is_obeyed(
    hub: LoopbackHub, file: HttpFile, fake_clock: FakeClock, value: str, seconds: float
) -> None:
    """In seconds, or as a date (the clock of this test stands at 2027-01-15 08:00); what is neither is no order."""
    hub.faults.append(Fault("status", "hub GET *", status=429, headers={"Retry-After": value}))
    assert file.read(0, SIZE) == WEIGHTS
    assert sum(fake_clock.pauses) == pytest.approx(seconds)


def test_a_pause_that_is_too_long_is_told_instead(hub: LoopbackHub, file: HttpFile, fake_clock: FakeClock) -> None:
    """A day is for the user to wait, not for the process."""
    hub.faults.append(Fault("status", "hub GET *", status=429, headers={"Retry-After": "86400"}))
    with pytest.raises(NetworkError, match=r"limits how often.*86,400 seconds"):
        file.read(0, 1)
    assert fake_clock.pauses == []


def test_an_expired_signature_is_renewed(hub: LoopbackHub, file: HttpFile, fake_clock: FakeClock) -> None:
    """Between two ranges and between two parts of one."""
    assert file.read(0, 10) == WEIGHTS[:10]
    hub.expire_signatures()
    hub.faults.append(Fault("drop", "cdn GET *", times=2, after_bytes=300_000))  # the refusal takes the first
    stream = file.stream(0, SIZE)
    got = next(stream)
    hub.expire_signatures()
    assert got + b"".join(stream) == WEIGHTS
    assert len(hub.requests_to("hub")) == 3
    assert [request.status for request in hub.requests_to("cdn")] == [206, 403, 206, 403, 206]
    assert sum(fake_clock.pauses) < 1


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_cdn_that_goes_on_refusing_is_not_asked_for_ever(hub: LoopbackHub, file: HttpFile, status: int) -> None:
    """A firewall answers so; the message names the host, and not the signature."""
    hub.faults.append(Fault("status", "cdn GET *", times=-1, status=status))
    with pytest.raises(NetworkError) as caught:
        file.read(0, 1)
    assert isinstance(caught.value, AccessDeniedError if status < 404 else RemoteNotFoundError)
    assert hub.cdn_endpoint.removeprefix("http://") in str(caught.value)
    assert "Signature" not in str(caught.value)
    assert len(hub.requests_to("cdn")) == 3


def test_an_address_that_brings_nothing_is_asked_for_anew(hub: LoopbackHub, file: HttpFile) -> None:
    """The next way may lead to a server that works."""
    file.read(0, 1)
    hub.faults.append(Fault("status", "cdn GET *", times=3, status=503))
    assert file.read(0, 1) == WEIGHTS[:1]
    assert len(hub.requests_to("hub")) == 4


def test_what_the_hub_itself_refuses_after_a_redirect_is_final(hub: LoopbackHub, fake_clock: FakeClock) -> None:
    """It is no signature that expired."""
    hub.renamed["org/old"] = "org/gated"
    repository = open_repository("org/old", endpoint=hub.endpoint, clock=fake_clock.clock())
    with pytest.raises(AccessDeniedError, match="gated"):
        repository.open_file("model.safetensors").read(0, 1)
    assert fake_clock.pauses == []


def test_redirects_in_a_circle_end(hub: LoopbackHub, client: HttpClient) -> None:
    """After ten of them."""
    url = hub.static_url("model.bin")
    hub.faults.append(Fault("status", times=-1, status=302, headers={"Location": url}))
    with pytest.raises(NetworkError, match="redirected without end"):
        HttpFile(client, url).read(0, 1)
    assert len(hub.requests) == 10


def test_another_file_of_another_size_is_noticed(hub: LoopbackHub, file: HttpFile) -> None:
    """Content-Range says of how many bytes a range is."""
    hub.faults.append(Fault("status", "hub GET *", status=302, headers={"Location": hub.static_url("model.bin")}))
    (hub.static / "model.bin").write_bytes(WEIGHTS + b"more")
    with pytest.raises(SourceChangedError, match="another size") as caught:
        file.read(0, 1)
    assert (caught.value.expected, caught.value.found) == (SIZE, SIZE + 4)


# --- files at any address -------------------------------------------------------------------------------------------


def test_a_plain_file_says_its_size_itself(hub: LoopbackHub, client: HttpClient) -> None:
    """By the answer to a request for its first byte."""
    file = HttpFile(client, hub.static_url("model.bin"))
    assert (file.name, file.size_bytes, file.location) == ("model.bin", SIZE, hub.static_url("model.bin"))
    assert file.read(5, 10) == WEIGHTS[5:10]
    assert [request.range for request in hub.requests] == ["bytes=0-0", "bytes=5-9"]


@pytest.mark.parametrize("kind", ["ignore_range", "status"])
def test_the_size_is_learnt_from_any_server(hub: LoopbackHub, client: HttpClient, kind: Kind) -> None:
    """One that ignores ranges says it too; a bad moment is waited for."""
    hub.faults.append(Fault(kind, status=503))
    assert HttpFile(client, hub.static_url("model.bin")).size_bytes == SIZE


def test_an_empty_file_has_no_first_byte(hub: LoopbackHub, client: HttpClient) -> None:
    """It is empty all the same."""
    (hub.static / "empty").write_bytes(b"")
    file = HttpFile(client, hub.static_url("empty"))
    assert (file.size_bytes, file.read(0, 0)) == (0, b"")


@pytest.mark.parametrize("kind", ["no_length", "gzip"])
def test_a_server_that_hides_the_size_is_refused(hub: LoopbackHub, client: HttpClient, kind: Kind) -> None:
    """Nothing could tell a whole file from half of it."""
    hub.faults.append(Fault(kind, times=-1))
    with pytest.raises(NetworkError, match="does not say how large"):
        _ = HttpFile(client, hub.static_url("model.bin")).size_bytes


def test_a_plain_file_that_is_missing_or_forbidden_is_told_apart(hub: LoopbackHub, client: HttpClient) -> None:
    """At once."""
    with pytest.raises(RemoteNotFoundError, match="404"):
        HttpFile(client, hub.static_url("nothing")).read(0, 1)
    hub.faults.append(Fault("status", status=403))
    with pytest.raises(AccessDeniedError, match="403"):
        HttpFile(client, hub.static_url("model.bin")).read(0, 1)
    assert len(hub.requests) == 2


def test_a_plain_file_that_is_replaced_meanwhile_is_noticed(hub: LoopbackHub, client: HttpClient) -> None:
    """By its ETag where the size is the same; and where it shrank, by the range that is not there any more."""
    file = HttpFile(client, hub.static_url("model.bin"))
    assert file.read(0, 10) == WEIGHTS[:10]
    (hub.static / "model.bin").write_bytes(WEIGHTS[::-1])
    with pytest.raises(SourceChangedError, match="another version"):
        file.read(0, 10)
    (hub.static / "model.bin").write_bytes(b"short")
    with pytest.raises(SourceChangedError, match="another size") as caught:
        file.read(100, 110)
    assert caught.value.found == 5
    hub.faults.append(Fault("ignore_range"))
    with pytest.raises(SourceChangedError, match="another size"):
        file.read(0, 10)


def test_a_server_that_ignores_ranges_is_borne_within_reason(
    hub: LoopbackHub, client: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is received for nothing is counted; beyond twice the file it is an error and not a loop."""
    monkeypatch.setattr("mmsplit.remote.http_file._SKIP_ALLOWANCE_BYTES", 0)
    hub.faults.append(Fault("ignore_range", times=-1))
    file = HttpFile(client, hub.static_url("model.bin"))
    for _ in range(2):
        assert file.read(SIZE - 10, SIZE) == WEIGHTS[-10:]
    assert client.traffic.snapshot().skipped_bytes == 2 * (SIZE - 10)
    assert file.read(0, 10) == WEIGHTS[:10]
    with pytest.raises(NetworkError, match="sends whole files"):
        file.read(SIZE - 10, SIZE)


def test_no_token_is_sent_to_any_address(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if one is at hand."""
    monkeypatch.setenv("HF_TOKEN", MEMBER_TOKEN)
    HttpFile(HttpClient(token=MEMBER_TOKEN), hub.static_url("model.bin")).read(0, 1)
    assert [request.authorization for request in hub.requests] == [None, None]
    assert "Authorization" not in HttpClient(token=MEMBER_TOKEN)._headers("https://huggingface.co/x", {})


def test_the_token_may_go_to_the_hub_behind_a_mirror_and_nowhere_else() -> None:
    """Scheme, host and port must be the Hub's or the mirror's."""
    client = HttpClient(endpoint="http://mirror:8080/hub", token=MEMBER_TOKEN)
    for url, expected in {
        "http://mirror:8080/x": True,
        "http://MIRROR:8080/x": True,
        "https://huggingface.co/x": True,
        "https://huggingface.co:443/x": True,
        "http://huggingface.co/x": False,
        "https://huggingface.co:444/x": False,
        "https://cdn.huggingface.co/x": False,
        "https://huggingface.co@elsewhere.example/x": False,
        "https://mirror:8080/x": False,
        "http://mirror/x": False,
    }.items():
        assert ("Authorization" in client._headers(url, {})) == expected, url


def test_secrets_of_an_address_are_used_and_not_told(hub: LoopbackHub, client: HttpClient) -> None:
    """User, password and query belong to the request only."""
    url = hub.static_url("nothing").replace("http://", "http://user:pa55word@") + "?sig=s3cret"
    file = HttpFile(client, url)
    with pytest.raises(RemoteNotFoundError) as caught:
        file.read(0, 1)
    assert file.location == hub.static_url("nothing")
    assert (hub.requests[0].authorization or "").startswith("Basic ")
    assert hub.requests[0].path.endswith("?sig=s3cret")
    for told in (str(caught.value), repr(caught.value), file.location, file.name, repr(client)):
        assert "pa55word" not in told
        assert "s3cret" not in told


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/file",
        "/etc/passwd",
        "file:///etc/passwd",
        "s3://bucket/file?sig=x",
        "http://[::1/x",
        "http://",
        "http://host:port/x",
    ],
)
def test_only_http_is_spoken(client: HttpClient, url: str) -> None:
    """Whatever else there is."""
    with pytest.raises(RequestError, match="not an HTTP address") as caught:
        HttpFile(client, url)
    assert "sig=x" not in str(caught.value)


def test_a_redirect_to_another_protocol_is_an_error(hub: LoopbackHub, client: HttpClient) -> None:
    """Nothing on this machine is read because a server says so."""
    for location in ("file:///etc/passwd", "http://[", "http://host:port/", "//", "http:///x"):
        hub.clear()
        hub.faults.append(Fault("status", times=-1, status=302, headers={"Location": location}))
        with pytest.raises(NetworkError):
            HttpFile(client, hub.static_url("model.bin")).read(0, 1)


# --- threads, and callers who stop -----------------------------------------------------------------------------------


def test_many_threads_read_one_file(hub: LoopbackHub, file: HttpFile) -> None:
    """With faults among them; every byte is right and every byte is counted."""
    before = file._client.traffic.snapshot()
    hub.faults.append(Fault("drop", "cdn GET *", times=5, after_bytes=10_000))
    parts = [(start, min(start + 50_000, SIZE)) for start in range(0, SIZE, 50_000)]
    with ThreadPoolExecutor(8) as threads:
        got = b"".join(threads.map(lambda part: file.read(*part), parts))
    after = file._client.traffic.snapshot()
    assert got == WEIGHTS
    assert after.received_bytes - before.received_bytes == SIZE
    assert after.request_count - before.request_count == len(hub.requests)


class Enough(Exception):  # noqa: N818 - no error
    """What a caller raises who has had enough."""


def test_go_on_ends_a_transfer_between_two_blocks(hub: LoopbackHub, file: HttpFile) -> None:
    """And is asked before the first."""
    calls: Iterator[int] = iter(range(3))

    def go_on() -> None:
        if next(calls, None) is None:
            raise Enough

    with pytest.raises(Enough):
        file.read(0, SIZE, go_on)
    hub.clear()
    with pytest.raises(Enough):
        file.read(0, SIZE, go_on)
    assert hub.requests == []


def test_go_on_ends_a_pause(hub: LoopbackHub, file: HttpFile, fake_clock: FakeClock) -> None:
    """A server may ask for minutes; who interrupts does not wait for them."""
    hub.faults.append(Fault("status", times=-1, status=429, headers={"Retry-After": "300"}))

    def go_on() -> None:
        if sum(fake_clock.pauses) > 1:
            raise Enough

    with pytest.raises(Enough):
        file.read(0, SIZE, go_on)
    assert sum(fake_clock.pauses) < 1.5


@pytest.mark.parametrize("fault", [None, Fault("status", "cdn *", status=403), Fault("wrong_range", "cdn *")])
def test_every_answer_is_closed(
    hub: LoopbackHub, file: HttpFile, fault: Fault | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that redirect, those that fail, and one whose stream is closed early: connections are few."""
    answers: list[httpx.Response] = []
    client = httpx.Client(event_hooks={"response": [answers.append]})
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: client)
    if fault:
        hub.faults.append(fault)
    with client:
        stream = file.stream(0, SIZE)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert [answer.is_closed for answer in answers] == [True] * (4 if fault else 2)


def test_a_stream_that_is_closed_early_gives_its_connection_back(hub: LoopbackHub, file: HttpFile) -> None:
    """Nothing of it goes on."""
    before = threading.active_count()
    stream = file.stream(0, SIZE)
    assert WEIGHTS.startswith(next(stream))
    stream.close()  # type: ignore[attr-defined]
    assert file.read(0, 10) == WEIGHTS[:10]
    assert threading.active_count() <= before + 3  # the loopback Hub's own
