"""Holds readers to a rate, so that a check in the background leaves the disk to those who work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from mmsplit.errors import RequestError

#: Sleeps are cut into pieces of this length, so that an interrupt or an error elsewhere ends them.
_NAP_SECONDS: Final = 0.2


class Pace:
    """All threads that share one read at most `bytes_per_second` together, counted from the first read.

    `now` and `sleep` are in seconds.  Time that nobody read in is not made up for: a rate is a limit, not an average.
    """

    def __init__(
        self,
        bytes_per_second: int,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if type(bytes_per_second) is not int or bytes_per_second < 1:
            raise RequestError("not a rate", found=repr(bytes_per_second), hint="Give bytes per second, at least 1.")
        self._rate = bytes_per_second
        self._now = now
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at: float | None = None

    def take(self, count_bytes: int, go_on: Callable[[], None]) -> None:
        """Wait until `count_bytes` may be read.  `go_on` is called between naps; it raises to give up."""
        with self._lock:
            now = self._now()
            begin = now if self._free_at is None else max(now, self._free_at)
            self._free_at = begin + count_bytes / self._rate
        while (left := begin - self._now()) > 0:
            go_on()
            self._sleep(min(left, _NAP_SECONDS))
