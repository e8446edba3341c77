"""Files behind fsspec: ranges, faults of a package that may raise anything, and packages that are not installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from loopback_fixtures import WEIGHTS, FakeClock
from loopback_hub import LoopbackHub

from mmsplit.errors import (
    AccessDeniedError,
    MissingExtraError,
    NetworkError,
    RemoteNotFoundError,
    RequestError,
    SourceChangedError,
)
from mmsplit.remote import fsspec_file
from mmsplit.remote.fsspec_file import FsspecFile
from mmsplit.remote.http_file import HttpFile
from mmsplit.remote.open_url import UrlFiles
from mmsplit.remote.patience import Limits

SIZE = len(WEIGHTS)
URL = "memory://bucket/folder/model.bin"


@pytest.fixture(autouse=True)
def _bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bucket in memory, and blocks so small that a file has several."""
    monkeypatch.setattr(fsspec_file, "_BLOCK_BYTES", 300_000)
    MemoryFileSystem().pipe_file("/bucket/folder/model.bin", WEIGHTS)
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def file(fake_clock: FakeClock) -> FsspecFile:
    return FsspecFile(URL, clock=fake_clock.clock())


@pytest.mark.parametrize(("start", "stop"), [(0, SIZE), (0, 0), (SIZE, SIZE), (299_999, 600_001), (SIZE - 1, SIZE)])
def test_a_range_is_exact(file: FsspecFile, start: int, stop: int) -> None:
    """Over several blocks, by each of the ways to read it."""
    assert file.read(start, stop) == WEIGHTS[start:stop]
    buffer = bytearray(stop - start)
    file.read_into(start, memoryview(buffer))
    assert buffer == WEIGHTS[start:stop]


def test_a_file_knows_itself(file: FsspecFile) -> None:
    """Name, place and size."""
    assert (file.name, file.location, file.size_bytes) == ("model.bin", URL, SIZE)
    with pytest.raises(RequestError, match="not within the file"):
        file.read(0, SIZE + 1)


def fail(monkeypatch: pytest.MonkeyPatch, *results: Any) -> None:
    """Make the next reads end in `results`, errors or bytes; those after them work."""
    ahead = list(results)
    real = MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, start: int, end: int) -> bytes:
        result = ahead.pop(0) if ahead else real(self, path, start=start, end=end)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


def test_a_block_that_fails_is_asked_for_again(
    file: FsspecFile, fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the package raises; and also one that comes too short."""
    fail(monkeypatch, OSError("reset"), TimeoutError(), KeyError("x"), WEIGHTS[:10])
    assert file.read(0, SIZE) == WEIGHTS
    assert sum(fake_clock.pauses) == pytest.approx(0.25 + 0.5 + 1 + 2)


def test_progress_forgets_failures(fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for each block are not too many for the file."""
    file = FsspecFile(URL, clock=fake_clock.clock(), limits=Limits(failures=3))
    results: list[object] = []
    for start in range(0, SIZE, 300_000):
        results += [OSError("reset"), OSError("reset"), WEIGHTS[start : start + 300_000]]
    fail(monkeypatch, *results)
    assert file.read(0, SIZE) == WEIGHTS


def test_a_look_at_a_file_that_fails_is_repeated(fake_clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad moment at the beginning is like any other."""
    real = MemoryFileSystem.info
    ahead = [OSError("reset"), OSError("reset")]

    def info(self: MemoryFileSystem, path: str) -> object:
        if ahead:
            raise ahead.pop()
        return real(self, path)

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    assert FsspecFile(URL, clock=fake_clock.clock()).size_bytes == SIZE
    assert sum(fake_clock.pauses) == pytest.approx(0.25 + 0.5)


FATAL: dict[str, tuple[object, type[Exception], str]] = {
    "gone": (FileNotFoundError("x"), RemoteNotFoundError, "no such file"),
    "denied": (PermissionError("for key=AKIA?sig at https://u:p@h/x?sig=s3cret"), AccessDeniedError, "credentials"),
    "half a package": (ImportError("no aiobotocore"), MissingExtraError, "no aiobotocore"),
    "no ranges": (NotImplementedError(), NetworkError, "cannot do it"),
    "too much": (WEIGHTS, NetworkError, "other bytes than asked for"),
}


@pytest.mark.parametrize(("result", "kind", "part"), FATAL.values(), ids=FATAL)
def test_what_no_attempt_mends_ends_at_once(
    file: FsspecFile,
    fake_clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    result: object,
    kind: type[Exception],
    part: str,
) -> None:
    """With what to do, and without secrets."""
    fail(monkeypatch, result)
    with pytest.raises(kind, match=part) as caught:
        file.read(0, 10)
    assert "s3cret" not in str(caught.value)
    assert fake_clock.pauses == []


def test_it_gives_up_in_the_end(file: FsspecFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming the package's own words."""
    fail(monkeypatch, WEIGHTS[:300_000], *[OSError("reset")] * 8)
    with pytest.raises(NetworkError, match=r"byte 300,000: the transfer failed \(OSError: reset\); gave up") as caught:
        file.read(0, SIZE)
    assert caught.value.offset == 300_000


def test_a_file_that_shrinks_meanwhile_is_noticed(file: FsspecFile) -> None:
    """By the range that is not there any more."""
    MemoryFileSystem().pipe_file("/bucket/folder/model.bin", b"short")
    with pytest.raises(SourceChangedError, match="another size") as caught:
        file.read(0, 10)
    assert (caught.value.expected, caught.value.found) == (SIZE, 5)


def test_what_is_not_a_file_is_refused() -> None:
    """Nothing, and a folder."""
    for url in ("memory://bucket/nothing", "memory://bucket/folder"):
        with pytest.raises(RemoteNotFoundError):
            FsspecFile(url)


@pytest.mark.parametrize(
    "url", ["hf://org/name/file", "https://host/file", "file:///etc/passwd", "/etc/passwd", "c://x", "xyz://y"]
)
def test_what_is_not_fsspecs_does_not_go_there(url: str) -> None:
    """fsspec would fetch a whole file of the Hub for each range."""
    with pytest.raises(RequestError):
        FsspecFile(url)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As fsspec names it."""

    def url_to_fs(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    with pytest.raises(MissingExtraError, match="Install s3fs to access S3"):
        FsspecFile("s3://bucket/file")


def test_any_address_is_opened_by_what_can_read_it(hub: LoopbackHub) -> None:
    """And all share one count."""
    files = UrlFiles()
    http, memory = files.open(hub.static_url("model.bin")), files.open(URL, name="folder/model.bin")
    assert (type(http), type(memory)) == (HttpFile, FsspecFile)
    assert (http.name, memory.name) == ("model.bin", "folder/model.bin")
    assert http.read(0, 10) == memory.read(0, 10) == WEIGHTS[:10]
    assert files.traffic.snapshot().received_bytes == 20
    with pytest.raises(RequestError):
        files.open("model.bin")


def test_go_on_ends_a_transfer_between_two_blocks(file: FsspecFile) -> None:
    """By raising."""

    def go_on() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.read(0, 10, go_on)
