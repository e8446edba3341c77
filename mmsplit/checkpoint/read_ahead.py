"""Announces what is going to be read, some time before it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from mmsplit.checkpoint.storage import ShardReaders

J = TypeVar("J")


class ShardRange(NamedTuple):
    """The bytes [`start`, `stop`) of a shard."""

    shard: str
    start: int
    stop: int


def iter_with_read_ahead(
    jobs: Iterable[J], readers: ShardReaders, ranges_of: Callable[[J], Iterable[ShardRange]]
) -> Iterator[J]:
    """Pass jobs on in order, having announced the ranges of those that follow, `readers.read_ahead_bytes` of them.

    Each job must borrow each of its ranges, exactly so, once.
    """
    waiting: deque[tuple[J, int]] = deque()
    ahead_bytes = 0
    for job in jobs:
        job_bytes = 0
        for shard, start, stop in ranges_of(job):
            readers.announce(shard, start, stop)
            job_bytes += stop - start
        waiting.append((job, job_bytes))
        ahead_bytes += job_bytes
        while ahead_bytes > readers.read_ahead_bytes and len(waiting) > 1:
            done, done_bytes = waiting.popleft()
            ahead_bytes -= done_bytes
            yield done
    for job, _ in waiting:
        yield job
