"""Ranges are borrowed ahead, in order, never more than there is room for, and all are given back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mmsplit.checkpoint import Scratch
from mmsplit.checkpoint.prefetcher import Prefetcher
from mmsplit.workers import WorkerGroup


class _Lender:
    """Lends each job's number as bytes, and knows what is out."""

    def __init__(self, fails_at: int = -1) -> None:
        self.out = 0
        self.most = 0
        self.scratches: set[int] = set()
        self._fails_at = fails_at
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, job: int, scratch: Scratch) -> Iterator[memoryview]:
        if job == self._fails_at:
            raise ValueError("the disk")
        with self._lock:
            assert id(scratch) not in self.scratches
            self.scratches.add(id(scratch))
            self.out += 1
            self.most = max(self.most, self.out)
        try:
            view = scratch.take(8)
            view[:] = job.to_bytes(8, "little")
            yield view
        finally:
            with self._lock:
                self.scratches.remove(id(scratch))
                self.out -= 1


def _run(prefetcher: Prefetcher[int], threads: int, fails_at: int = -1) -> list[int]:
    done: list[int] = []

    def work() -> None:
        while (loan := prefetcher.take()) is not None:
            with loan:
                assert int.from_bytes(loan.data, "little") == loan.job
                if loan.job == fails_at:
                    raise ValueError("the work")
                done.append(loan.number)

    try:
        with WorkerGroup(prefetcher.cancel) as group:
            prefetcher.start(group)
            for number in range(threads):
                group.start(f"work-{number}", work)
    finally:
        prefetcher.close()
    return done


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_job_once_with_its_bytes(depth: int, threads: int) -> None:
    """In order to one thread; never more ranges out than there is room for; none left out at the end."""
    lender = _Lender()
    prefetcher = Prefetcher(iter(range(200)), lender.borrow, depth)
    done = _run(prefetcher, threads)
    assert sorted(done) == list(range(200))
    assert threads > 1 or done == sorted(done)
    assert prefetcher.job_count == 200
    assert lender.most <= depth
    assert lender.out == 0


def test_no_jobs() -> None:
    """End at once."""
    assert _run(Prefetcher(iter(()), _Lender().borrow, 3), 2) == []


@pytest.mark.parametrize("who", ["the disk", "the work"])
def test_an_error_ends_all_threads_and_gives_all_back(who: str) -> None:
    """Whether reading fails or what is done with it: the error comes out, and no range stays borrowed."""
    lender = _Lender(40 if who == "the disk" else -1)
    with pytest.raises(ValueError, match=who):
        _run(Prefetcher(iter(range(1000)), lender.borrow, 5), 2, 40 if who == "the work" else -1)
    assert lender.out == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mmsplit-")]


def test_it_reads_before_it_is_asked() -> None:
    """With room for three, three are read although nobody has taken one."""
    lender, full = _Lender(), threading.Event()
    borrow = lender.borrow

    @contextmanager
    def counting(job: int, scratch: Scratch) -> Iterator[memoryview]:
        with borrow(job, scratch) as view:
            if lender.out == 3:
                full.set()
            yield view

    prefetcher = Prefetcher(iter(range(9)), counting, 3)
    with WorkerGroup(prefetcher.cancel) as group:
        prefetcher.start(group)
        assert full.wait(30)
        prefetcher.cancel()
    prefetcher.close()
    assert lender.out == 0
