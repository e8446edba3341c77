"""What moved over the network: counters that all files of one source share."""

from __future__ import annotations

import threading
from typing import NamedTuple


class TrafficSnapshot(NamedTuple):
    """The counters at one moment.

    `received_bytes` are all bytes of bodies that arrived; `skipped_bytes` those among them that nobody asked for,
    because a server ignored the Range of a request; `retry_count` how often something had to be asked for again.
    """

    request_count: int
    received_bytes: int
    skipped_bytes: int
    retry_count: int


class Traffic:
    """Counts requests, bytes and retries; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = TrafficSnapshot(0, 0, 0, 0)

    def snapshot(self) -> TrafficSnapshot:
        """Return the counters as they are now, all of the same moment."""
        return self._counts

    def requested(self) -> None:
        """Count one request that is sent."""
        self._add(1, 0, 0, 0)

    def received(self, count_bytes: int, *, skipped_bytes: int = 0) -> None:
        """Count a block of a body, `skipped_bytes` of which were not wanted."""
        self._add(0, count_bytes, skipped_bytes, 0)

    def retried(self) -> None:
        """Count one more attempt at something that failed."""
        self._add(0, 0, 0, 1)

    def _add(self, requests: int, received: int, skipped: int, retries: int) -> None:
        with self._lock:
            old = self._counts
            self._counts = TrafficSnapshot(
                old.request_count + requests,
                old.received_bytes + received,
                old.skipped_bytes + skipped,
                old.retry_count + retries,
            )
