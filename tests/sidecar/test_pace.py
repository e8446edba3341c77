"""A rate is never exceeded, whoever reads; the clock is the test's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.errors import RequestError
from mmsplit.sidecar.pace import Pace


class _Clock:
    """Time that passes only in sleeps, and when the test says so."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= 0.2
        self.time += seconds


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 5)), min_size=1, max_size=20), st.integers(1, 2000))
def test_no_more_than_the_rate(reads: list[tuple[int, float]], rate: int) -> None:
    """When a read begins, all bytes before it have had their time, whatever pauses there were."""
    clock = _Clock()
    pace = Pace(rate, now=clock.now, sleep=clock.sleep)
    before: list[tuple[float, int]] = []
    for count, pause in reads:
        clock.time += pause
        pace.take(count, lambda: None)
        for number, (begun, _) in enumerate(before):
            assert sum(each for _, each in before[number:]) <= rate * (clock.time - begun) * (1 + 1e-9) + 1e-6
        before.append((clock.time, count))


def test_the_first_read_does_not_wait_and_the_next_one_does() -> None:
    """One second of bytes is one second of waiting, for the next."""
    clock = _Clock()
    pace = Pace(1000, now=clock.now, sleep=clock.sleep)
    pace.take(3000, lambda: None)
    assert clock.time == 100.0
    pace.take(1, lambda: None)
    assert clock.time == pytest.approx(103.0)


def test_waiting_ends_when_the_work_does() -> None:
    """An error elsewhere ends a wait of hours at its next nap."""

    class StopError(Exception):
        pass

    def stop() -> None:
        raise StopError

    clock = _Clock()
    pace = Pace(1, now=clock.now, sleep=clock.sleep)
    pace.take(1 << 30, stop)
    with pytest.raises(StopError):
        pace.take(1, stop)
    assert clock.time == 100.0


@pytest.mark.parametrize("rate", [0, -1, 1.5, True])
def test_what_is_no_rate_is_refused(rate: int) -> None:
    """No byte per second would mean for ever."""
    with pytest.raises(RequestError, match="not a rate"):
        Pace(rate)
