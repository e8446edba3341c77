"""How often and after what pauses: arithmetic, without a clock."""

from __future__ import annotations

import sys
import threading

import pytest
from loopback_fixtures import FakeClock

from mmsplit.errors import AccessDeniedError, NetworkError
from mmsplit.remote.patience import Attempts, Clock, Limits, TransferInterrupted, parse_retry_after
from mmsplit.remote.transfer_log import Traffic, TrafficSnapshot

RETRY_AFTER = {
    "0": 0.0,
    " 7 ": 7.0,
    "Fri, 15 Jan 2027 08:00:30 GMT": 30.0,
    "Fri, 15 Jan 2027 07:00:00 GMT": 0.0,
    "Fri, 15 Jan 2027 08:00:30 +0000": 30.0,
    None: None,
    "": None,
    "-1": None,
    "1.5": None,
    "soon": None,
    "\u0663": None,  # a digit, but not of HTTP
    "Fri, 99 Jan 2027 08:00:00 GMT": None,
    "9" * 400: 999_999_999_999.0,
}


@pytest.mark.parametrize(("value", "seconds"), RETRY_AFTER.items())
def test_retry_after_is_parsed(value: str | None, seconds: float | None) -> None:
    """Seconds or a date; anything else is nothing."""
    assert parse_retry_after(value, now=1_800_000_000.0) == seconds


def pauses(chance: float, *interruptions: TransferInterrupted, limits: Limits | None = None) -> list[float]:
    """The length of each pause."""
    slept: list[float] = []
    lengths = []
    clock = Clock(slept.append, lambda: 0.0, lambda: chance)
    attempts = Attempts("place", limits or Limits(failures=100), clock, Traffic())
    for interruption in interruptions:
        slept.clear()
        attempts.failed(interruption)
        lengths.append(round(sum(slept), 6))
    return lengths


def test_pauses_grow_to_a_limit() -> None:
    """Twice as long each time, and by chance down to half of that, lest all clients come back at once."""
    failures = [TransferInterrupted("x") for _ in range(8)]
    assert pauses(1.0, *failures) == [0.5, 1, 2, 4, 8, 16, 20, 20]
    assert pauses(0.0, *failures) == [0.25, 0.5, 1, 2, 4, 8, 10, 10]


def test_what_a_server_asks_for_is_the_least() -> None:
    """However often it has failed before."""
    failures = [TransferInterrupted("x"), TransferInterrupted("x", retry_after_seconds=0.4)]
    assert pauses(0.0, *failures) == [0.25, 0.4]
    assert pauses(1.0, *failures) == [0.5, 0.9]
    assert pauses(0.0, TransferInterrupted("x", retry_after_seconds=600)) == [600]


def test_progress_forgets_failures(fake_clock: FakeClock) -> None:
    """The count and the length of the pauses."""
    traffic = Traffic()
    attempts = Attempts("place", Limits(failures=2), fake_clock.clock(), traffic)
    for _ in range(10):
        attempts.failed(TransferInterrupted("x"))
        attempts.progressed()
    assert sum(fake_clock.pauses) == pytest.approx(2.5)
    attempts.failed(TransferInterrupted("x"))
    with pytest.raises(NetworkError, match=r"place, byte 7: it broke; gave up after 2 attempts"):
        attempts.failed(TransferInterrupted("it broke"), 7)
    assert traffic.snapshot().retry_count == 11


def test_an_interruption_may_know_better_when_to_end_and_how(fake_clock: FakeClock) -> None:
    """A refusal is asked about less often, and has an error of its own; too long a pause ends in it as well."""
    final = AccessDeniedError("no")
    attempts = Attempts("place", Limits(), fake_clock.clock(), Traffic())
    attempts.failed(TransferInterrupted("x", most_failures=2, final_error=final))
    with pytest.raises(AccessDeniedError):
        attempts.failed(TransferInterrupted("x", most_failures=2, final_error=final))
    attempts = Attempts("place", Limits(), fake_clock.clock(), Traffic())
    with pytest.raises(AccessDeniedError):
        attempts.failed(TransferInterrupted("x", retry_after_seconds=1e9, final_error=final))


def test_traffic_counts_exactly_from_many_threads() -> None:
    """No update is lost."""
    traffic = Traffic()

    def work() -> None:
        for _ in range(2000):
            traffic.requested()
            traffic.received(3, skipped_bytes=1)
            traffic.retried()

    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that a lost update would show
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert traffic.snapshot() == TrafficSnapshot(8000, 24_000, 8000, 8000)
