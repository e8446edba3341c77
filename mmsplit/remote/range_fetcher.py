"""Downloads ranges ahead of those who need them, several at once, in bounded memory.

Strategy.  Whoever is going to need ranges announces them, each once, in the order of need.  Neighbours in a file are
joined to one request.  Requests get a buffer in that same order, and a connection fills it; `borrow` waits for the
bytes of its range and lends them where they lie.  When every range announced in a request has been given back, its
buffer serves the next one.

Why nobody waits for ever: buffers are given in the order of need, so the earliest range that somebody waits for always
has one or is next to get one, and those who hold a range wait for nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from mmsplit.checkpoint import aligned_buffer
from mmsplit.errors import RequestError
from mmsplit.remote.remote_file import RemoteFile
from mmsplit.workers import Stopped, WorkerGroup

#: A request asks for this much at most.  Each connection has a buffer of this size, and there are two more.
REQUEST_BYTES: Final = 8 << 20
#: Bytes that nobody asked for, but that cost less than a request of their own.
_GAP_BYTES: Final = 64 << 10
_SPARE_BUFFERS: Final = 2
#: Those who wait are woken once in so many bytes: a network hands over a few kilobytes at a time.
_NEWS_BYTES: Final = 1 << 20


class _Request:
    """Bytes [start, stop) of one file, wanted by `uses` announced ranges; `buffer` is lent to it for its life."""

    def __init__(self, name: str, start: int, stop: int) -> None:
        self.name = name
        self.start = start
        self.stop = stop
        self.uses = 1
        self.received_bytes = 0
        self.buffer: memoryview | None = None

    def join(self, start: int, stop: int) -> bool:
        """Take one more range if it begins where this ends, or soon after; returns whether it did."""
        if not self.stop <= start <= self.stop + _GAP_BYTES or stop - self.start > REQUEST_BYTES:
            return False
        self.stop = stop
        self.uses += 1
        return True


class RangeFetcher:
    """Ranges of files that `open_file` opens by name; safe to share between threads.

    Use it in a `with` block: at its end all connections are closed.
    """

    def __init__(self, open_file: Callable[[str], RemoteFile], connections: int) -> None:
        self._open_file = open_file
        self._connections = connections
        self._changed = threading.Condition()
        self._files: dict[str, RemoteFile] = {}
        self._waiting: deque[_Request] = deque()
        self._requests: dict[tuple[str, int, int], deque[_Request]] = {}
        self._free = [memoryview(b"")] * (connections + _SPARE_BUFFERS)
        self._needed_bytes = 0
        self._group: WorkerGroup | None = None
        self._cancelled = False
        self._failed = False

    @property
    def read_ahead_bytes(self) -> int:
        """How far ahead to announce, so that there is something to join when a connection is free."""
        return 2 * REQUEST_BYTES * len(self._free)

    @property
    def needed_bytes(self) -> int:
        """Length of all ranges announced so far."""
        return self._needed_bytes

    def announce(self, name: str, start: int, stop: int) -> None:
        """Say that [start, stop), at most `REQUEST_BYTES`, will be borrowed once, after those announced before."""
        if not 0 < stop - start <= REQUEST_BYTES:
            raise RequestError(f"cannot fetch {stop - start:,} bytes at once", expected=f"1 to {REQUEST_BYTES:,}")
        with self._changed:
            self._needed_bytes += stop - start
            last = self._waiting[-1] if self._waiting else None
            if last is None or last.name != name or not last.join(start, stop):
                last = _Request(name, start, stop)
                self._waiting.append(last)
            self._requests.setdefault((name, start, stop), deque()).append(last)
            starts = self._group is None
            if self._group is None:
                self._group = WorkerGroup(self._fail)
            self._changed.notify_all()
        if starts:  # without the lock: if a thread cannot be had, those that run need it to end
            for number in range(self._connections):
                self._group.start(f"fetch-{number}", self._fetch_all)

    def is_announced(self, name: str, start: int, stop: int) -> bool:
        """Whether this very range was announced and not borrowed yet."""
        with self._changed:
            return (name, start, stop) in self._requests

    @contextmanager
    def borrow(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """Lend a range that was announced, as soon as it is here; the view is valid until the block ends.

        Raises what downloading raised, or `Stopped` after `cancel`.
        """
        with self._changed:
            requests = self._requests.get((name, start, stop))
            if not requests:
                raise RequestError("range was not announced", path=name, offset=start)
            request = requests.popleft()
            if not requests:
                del self._requests[name, start, stop]
            self._changed.wait_for(
                lambda: self._cancelled or self._failed or request.received_bytes >= stop - request.start
            )
            if request.received_bytes < stop - request.start:
                self._raise()
            assert request.buffer is not None
            view = request.buffer[start - request.start : stop - request.start].toreadonly()
        try:
            yield view
        finally:
            view.release()
            with self._changed:
                request.uses -= 1
                self._recycle(request)
                self._changed.notify_all()

    def cancel(self) -> None:
        """Wake everybody who waits, and let connections end."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def __enter__(self) -> RangeFetcher:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cancel()
        if self._group is not None:
            try:
                self._group.join()
            except Exception:
                pass  # raised where somebody waited for the bytes; if nobody did, nobody needs them

    def _fail(self) -> None:
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def _raise(self) -> None:
        """Raise the error of the connection that failed; `Stopped` if none did."""
        if self._failed and self._group is not None:
            error = self._group.error
            if error is not None:
                raise error
        raise Stopped

    def _go_on(self) -> None:
        if self._cancelled or self._failed:
            raise Stopped

    def _fetch_all(self) -> None:
        while True:
            self._fetch(self._next())

    def _next(self) -> _Request:
        """Take the next request and give it a buffer; both in order of need."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._failed or (self._waiting and self._free))
            self._go_on()
            request = self._waiting.popleft()
            # Buffers are made when first used, and touched only as far as they are filled.
            request.buffer = self._free.pop() or memoryview(aligned_buffer(REQUEST_BYTES))
            return request

    def _fetch(self, request: _Request) -> None:
        with self._changed:
            file = self._files.get(request.name)
            if file is None:
                file = self._files[request.name] = self._open_file(request.name)
        assert request.buffer is not None
        position = 0
        for block in file.stream(request.start, request.stop, self._go_on):
            request.buffer[position : position + len(block)] = block
            position += len(block)
            if position - request.received_bytes >= _NEWS_BYTES:
                self._tell(request, position)
        self._tell(request, position)

    def _tell(self, request: _Request, received_bytes: int) -> None:
        with self._changed:
            request.received_bytes = received_bytes
            self._recycle(request)
            self._changed.notify_all()

    def _recycle(self, request: _Request) -> None:
        """Give the buffer back when it is full and nobody needs it any more."""
        if request.uses == 0 and request.buffer is not None and request.received_bytes == request.stop - request.start:
            self._free.append(request.buffer)
            request.buffer = None
