"""Ranges fetched ahead: the right bytes, joined requests, bounded memory, nobody left waiting."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest

from mmsplit.errors import NetworkError, RequestError
from mmsplit.remote import range_fetcher
from mmsplit.remote.range_fetcher import RangeFetcher
from mmsplit.remote.remote_file import GoOn, RemoteFile, never_stop
from mmsplit.workers import Stopped

DATA = random.Random(3).randbytes(100_000)


class MemoryFile(RemoteFile):
    """Serves `DATA`, notes what was asked for, and calls `on_block` before each block of a thousand bytes."""

    def __init__(self, name: str, asked: list[tuple[str, int, int]], on_block: Callable[[], None]) -> None:
        self._name = name
        self._asked = asked
        self._on_block = on_block

    @property
    def name(self) -> str:
        return self._name

    @property
    def location(self) -> str:
        return self._name

    @property
    def size_bytes(self) -> int:
        return len(DATA)

    def stream(self, start: int, stop: int, go_on: GoOn = never_stop) -> Iterator[bytes]:
        self._asked.append((self._name, start, stop))
        for position in range(start, stop, 1000):
            go_on()
            self._on_block()
            yield DATA[position : min(position + 1000, stop)]


@pytest.fixture
def asked() -> list[tuple[str, int, int]]:
    """What was requested, in order of the requests' beginnings."""
    return []


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of 8 kB that skip 100 bytes at most."""
    monkeypatch.setattr(range_fetcher, "REQUEST_BYTES", 8000)
    monkeypatch.setattr(range_fetcher, "_GAP_BYTES", 100)
    monkeypatch.setattr(range_fetcher, "_NEWS_BYTES", 1000)


def fetcher(
    asked: list[tuple[str, int, int]], connections: int = 2, on_block: Callable[[], None] = lambda: None
) -> RangeFetcher:
    return RangeFetcher(lambda name: MemoryFile(name, asked, on_block), connections)


@pytest.mark.parametrize("connections", [1, 2, 5])
@pytest.mark.parametrize("consumers", [1, 3])
def test_every_range_arrives(asked: list[tuple[str, int, int]], connections: int, consumers: int) -> None:
    """Far more is announced than the buffers hold; threads take the ranges in order, each its own."""
    ranges = [("ab"[start // 3000 % 2], start, start + 2500) for start in range(0, 97_000, 1500)]
    wrong: list[object] = []
    todo = iter(ranges)
    lock = threading.Lock()

    def consume() -> None:
        while True:
            with lock:
                job = next(todo, None)
            if job is None:
                return
            name, start, stop = job
            with fetch.borrow(name, start, stop) as view:
                if view != DATA[start:stop] or not view.readonly:
                    wrong.append(job)

    with fetcher(asked, connections) as fetch:
        for name, start, stop in ranges:
            fetch.announce(name, start, stop)
        threads = [threading.Thread(target=consume) for _ in range(consumers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert fetch.needed_bytes == 2500 * len(ranges)
    assert wrong == []


def test_neighbours_are_one_request(asked: list[tuple[str, int, int]]) -> None:
    """Across small gaps, up to the size of a request, never across files or backwards."""
    gate = threading.Event()
    with fetcher(asked, 1, lambda: gate.wait() and None) as fetch:
        fetch.announce("first", 0, 1)  # keeps the one connection busy while the others are announced
        while not asked:
            pass
        for name, start, stop in (
            ("x", 0, 1000),
            ("x", 1000, 2000),
            ("x", 2100, 3000),  # a gap that is smaller than a request is dear
            ("x", 3101, 4000),  # one that is not
            ("x", 4000, 8000),
            ("x", 8000, 11_101),
            ("x", 11_101, 11_102),  # would make the request longer than 8000
            ("y", 11_102, 11_103),
            ("y", 5, 6),
        ):
            fetch.announce(name, start, stop)
        gate.set()
        for name, start, stop in (("first", 0, 1), ("x", 0, 1000), ("x", 1000, 2000), ("x", 2100, 3000)):
            with fetch.borrow(name, start, stop) as view:
                assert view == DATA[start:stop]
        for name, start, stop in (("x", 3101, 4000), ("x", 4000, 8000), ("x", 8000, 11_101), ("x", 11_101, 11_102)):
            with fetch.borrow(name, start, stop) as view:
                assert view == DATA[start:stop]
        for name, start, stop in (("y", 11_102, 11_103), ("y", 5, 6)):
            with fetch.borrow(name, start, stop) as view:
                assert view == DATA[start:stop]
    assert asked == [
        ("first", 0, 1),
        ("x", 0, 3000),
        ("x", 3101, 11_101),
        ("x", 11_101, 11_102),
        ("y", 11_102, 11_103),
        ("y", 5, 6),
    ]


def test_two_ranges_from_one_start(asked: list[tuple[str, int, int]]) -> None:
    """Each is what was announced, whichever is borrowed first: the shorter one does not stand for the longer."""
    with fetcher(asked) as fetch:
        fetch.announce("x", 10, 20)
        fetch.announce("x", 10, 4000)
        assert not fetch.is_announced("x", 10, 30)
        for start, stop in ((10, 4000), (10, 20)):
            with fetch.borrow("x", start, stop) as view:
                assert view == DATA[start:stop]


def test_the_same_range_twice(asked: list[tuple[str, int, int]]) -> None:
    """Announced twice, it can be borrowed twice and not a third time."""
    with fetcher(asked) as fetch:
        for _ in range(2):
            fetch.announce("x", 10, 20)
        for _ in range(2):
            assert fetch.is_announced("x", 10, 20)
            with fetch.borrow("x", 10, 20) as view:
                assert view == DATA[10:20]
        assert not fetch.is_announced("x", 10, 20)
        with pytest.raises(RequestError, match="not announced"), fetch.borrow("x", 10, 20):
            pass


def test_no_more_is_fetched_than_the_buffers_hold(asked: list[tuple[str, int, int]]) -> None:
    """Until somebody gives a range back: one connection and two spare buffers make three requests."""
    with fetcher(asked, 1) as fetch:
        for start in range(0, 80_000, 8000):
            fetch.announce("x", start, start + 8000)
        with fetch.borrow("x", 16_000, 24_000):
            assert [start for _, start, _ in asked] == [0, 8000, 16_000]
            with fetch.borrow("x", 0, 8000):
                assert len(asked) == 3
            with fetch.borrow("x", 24_000, 32_000):
                assert len(asked) == 4


@pytest.mark.parametrize("connections", [1, 3])
def test_error_of_a_connection_is_raised_where_somebody_waits(
    asked: list[tuple[str, int, int]], connections: int
) -> None:
    """Also for ranges whose turn never came."""

    def fail() -> None:
        raise NetworkError("gone", path="x")

    with fetcher(asked, connections, fail) as fetch:
        for start in range(0, 80_000, 8000):
            fetch.announce("x", start, start + 8000)
        for start in (72_000, 0):
            with pytest.raises(NetworkError, match="gone"), fetch.borrow("x", start, start + 8000):
                pass


def test_cancel_wakes_those_who_wait(asked: list[tuple[str, int, int]]) -> None:
    """A waiting thread raises `Stopped`, and the end of the block joins the connections."""
    begun, ended = threading.Event(), threading.Event()
    outcome: list[type[BaseException]] = []

    def wait() -> None:
        try:
            with fetch.borrow("x", 0, 8000):
                pass
        except Stopped as stop:
            outcome.append(type(stop))

    def block() -> None:
        begun.set()
        ended.wait()

    with fetcher(asked, 1, block) as fetch:
        fetch.announce("x", 0, 8000)
        thread = threading.Thread(target=wait)
        thread.start()
        begun.wait()
        fetch.cancel()
        thread.join()
        ended.set()
    assert outcome == [Stopped]


@pytest.mark.parametrize(("start", "stop"), [(5, 5), (6, 5), (0, 8001)])
def test_ranges_that_fit_no_buffer_are_refused(asked: list[tuple[str, int, int]], start: int, stop: int) -> None:
    with fetcher(asked) as fetch, pytest.raises(RequestError):
        fetch.announce("x", start, stop)
