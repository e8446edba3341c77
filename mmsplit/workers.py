"""Threads that work off one stream of jobs: the first error ends all, an interrupt ends all, nobody is left behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Generic, NamedTuple, TypeVar

from mmsplit.errors import RequestError

J = TypeVar("J")

#: An interrupt is seen after so long at the latest.
_INTERRUPT_SECONDS: Final = 0.2
_MOST: Final = 1024
_MOST_BY_DEFAULT: Final = 16


class Progress(NamedTuple):
    """How far a stage has come; handed to a caller's callback from any thread, at most once per few megabytes."""

    stage: str
    done_bytes: int
    total_bytes: int


ProgressCallback = Callable[[Progress], None]


class ProgressCounter:
    """Adds up what threads have done in one stage and tells the callback."""

    def __init__(self, stage: str, total_bytes: int, callback: ProgressCallback | None) -> None:
        self._stage = stage
        self._total = total_bytes
        self._callback = callback
        self._lock = threading.Lock()
        self._done = 0

    def add(self, count_bytes: int) -> None:
        """Count bytes as done."""
        if self._callback is None:
            return
        with self._lock:
            self._done += count_bytes
            self._callback(Progress(self._stage, self._done, self._total))


def thread_count(threads: int | None) -> int:
    """Return how many threads are to compute: what the caller wants, or the processors this process may use.

    Each thread has some 8 MiB of buffers, so that without a wish there are no more than `_MOST_BY_DEFAULT`.  Raises
    `RequestError` for a number that is none.
    """
    if threads is None:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(available, _MOST_BY_DEFAULT)
    if type(threads) is not int or not 1 <= threads <= _MOST:
        raise RequestError(f"cannot work with {threads!r} threads", hint=f"Give a number from 1 to {_MOST}.")
    return threads


class Stopped(Exception):  # noqa: N818 - not an error: the error is elsewhere
    """Raised by a job that notices that the group is stopping; the group swallows it."""


class WorkerGroup:
    """Threads started together and joined together.

    `on_stop` is called once, from the thread that failed or from the interrupted caller, and must wake every thread
    that waits for another.
    """

    def __init__(self, on_stop: Callable[[], None] = lambda: None) -> None:
        self._on_stop = on_stop
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._threads: list[tuple[threading.Thread, threading.Event]] = []

    @property
    def is_stopping(self) -> bool:
        """Whether no further job should be begun."""
        return self._stopping.is_set()

    @property
    def error(self) -> BaseException | None:
        """What ended the group, if anything has."""
        return self._error

    def go_on(self) -> None:
        """Raise `Stopped` if the group is stopping; for jobs that take long."""
        if self.is_stopping:
            raise Stopped

    def start(self, name: str, body: Callable[[], None]) -> None:
        """Start a thread that runs `body`."""
        ended = threading.Event()

        def run() -> None:
            try:
                body()
            except Stopped:
                pass
            except BaseException as error:
                self._stop(error)
            finally:
                ended.set()

        thread = threading.Thread(target=run, name=f"mmsplit-{name}", daemon=True)
        self._threads.append((thread, ended))  # first: an interrupt may come between any two steps
        try:
            thread.start()
        except BaseException as error:  # no more threads to be had, or an interrupt: those that run must end
            if not thread.is_alive():
                ended.set()
            self._stop(error)
            self._join_all()
            raise

    def start_many(
        self, name: str, count: int, jobs: JobStream[J], make_worker: Callable[[], Callable[[J], None]]
    ) -> None:
        """Start `count` threads, each with a worker of its own, that take jobs from one stream until it ends."""

        def body() -> None:
            work = make_worker()
            while not self.is_stopping:
                job = jobs.take()
                if job is None:
                    return
                work(job)

        for number in range(count):
            self.start(f"{name}-{number}", body)

    def join(self) -> None:
        """Wait for all threads; raise the first error of any of them, after all have ended.

        An interrupt stops the group; one that follows it does not cut the waiting short, since a thread that is
        left behind might write to a file that is not ours any more.
        """
        self._join_all()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stop(error)
        self._join_all()
        if error is None and self._error is not None:
            raise self._error

    def _join_all(self) -> None:
        while True:
            try:
                return self._join_each()
            except BaseException as error:
                self._stop(error)

    def _join_each(self) -> None:
        for thread, ended in self._threads:
            # Not `join` alone: in Python 3.11 an interrupted `Thread.join` takes the thread for ended ever after.  Not
            # without end either: an interrupt just before the wait, or any on Windows, is seen when it is over.
            while not ended.wait(_INTERRUPT_SECONDS):
                pass
            if thread.ident is not None:
                thread.join()

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = error
        self._stopping.set()
        self._on_stop()


class JobStream(Generic[J]):
    """An iterator that threads may share; jobs come out in order, each once."""

    def __init__(self, jobs: Iterator[J]) -> None:
        self._jobs = jobs
        self._lock = threading.Lock()

    def take(self) -> J | None:
        """Return the next job, or None after the last."""
        with self._lock:
            return next(self._jobs, None)
