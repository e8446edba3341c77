"""Reads what threads will work on before they ask for it.

A thread that reads a range and then decodes it leaves the disk idle while it decodes, and its processor while it
reads.  More such threads than processors fill some of the gaps and open others, since all may wait at the same moment.
So reading has threads of its own, which stay a fixed number of ranges ahead: the disk is asked for the next range
when it has delivered one, and those who decode find theirs in memory.

The kernel can be asked to read ahead, too, but reads 4 KiB pages then (`POSIX_FADV_WILLNEED`, ext4, Linux 6.18:
1.3 to 2.1 GB/s where reading in large blocks gave 2.6 to 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final, Generic, TypeVar

from mmsplit.checkpoint.file_reader import Scratch
from mmsplit.queues import OrderedQueue, Pool
from mmsplit.workers import JobStream, WorkerGroup

J = TypeVar("J")

#: One thread waits for the disk while another asks it for more.
_READERS: Final = 2


class Loan(Generic[J]):
    """A job and the bytes that were borrowed for it; use it in a `with` block, which gives them back."""

    def __init__(
        self, number: int, job: J, borrowed: AbstractContextManager[memoryview], scratch: Scratch, free: Pool[Scratch]
    ) -> None:
        self.number = number
        self.job = job
        self._borrowed = borrowed
        self._scratch = scratch
        self._free = free
        self.data = borrowed.__enter__()

    def __enter__(self) -> Loan[J]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not told of the error: it is none of the reading.
        self._borrowed.__exit__(None, None, None)
        self._free.give(self._scratch)


class Prefetcher(Generic[J]):
    """Borrows the bytes of each of a stream of jobs, in order, `depth` at most at a time.

    `borrow` is called in a thread of the prefetcher and returns what lends the bytes of a job (`FileReader.borrow`);
    they are given back in the thread that worked on them.  Call `cancel` when the group stops, and `close` after it.
    """

    def __init__(
        self, jobs: Iterator[J], borrow: Callable[[J, Scratch], AbstractContextManager[memoryview]], depth: int
    ) -> None:
        self._count = 0
        self._jobs = JobStream(self._numbered(jobs))
        self._borrow = borrow
        self._free = Pool([Scratch() for _ in range(depth)])
        self._ready: OrderedQueue[Loan[J]] = OrderedQueue()

    @property
    def job_count(self) -> int:
        """How many jobs there are; known when `take` has returned None."""
        return self._count

    def start(self, group: WorkerGroup) -> None:
        """Start reading."""
        for number in range(_READERS):
            group.start(f"read-{number}", self._read)

    def take(self) -> Loan[J] | None:
        """Wait for the next job, in order; None after the last.  Raises `Stopped` if the group is stopping."""
        taken = self._ready.take()
        return None if taken is None else taken[1]

    def cancel(self) -> None:
        """End every thread that waits for bytes, or for room for them."""
        self._free.cancel()
        self._ready.cancel()

    def close(self) -> None:
        """Give back what nobody has taken; no thread may be working."""
        for loan in self._ready.drain():
            with loan:
                pass

    def _numbered(self, jobs: Iterator[J]) -> Iterator[tuple[int, J]]:
        for job in jobs:
            self._count += 1
            yield self._count - 1, job

    def _read(self) -> None:
        while True:
            # First the room, then the job: so the earliest job of all is never one that waits for room.
            scratch = self._free.take()
            numbered = self._jobs.take()
            if numbered is None:
                self._free.give(scratch)
                self._ready.end(self._count)
                return
            number, job = numbered
            self._ready.put(number, Loan(number, job, self._borrow(job, scratch), scratch, self._free))
