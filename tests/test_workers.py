"""Threads that work together: the first error ends all, and nobody is left behind."""

import os
import signal
import threading
from collections.abc import Callable

import pytest

from mmsplit.errors import RequestError
from mmsplit.workers import JobStream, Progress, ProgressCounter, Stopped, WorkerGroup, thread_count


def alive() -> list[str]:
    """The threads of ours that still run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mmsplit-")]


@pytest.mark.parametrize("count", [1, 4])
def test_jobs_come_in_order_each_once(count: int) -> None:
    """From one stream to one thread in order; to several, each job to exactly one."""
    done: list[int] = []
    group = WorkerGroup()
    group.start_many("work", count, JobStream(iter(range(500))), lambda: done.append)
    group.join()
    assert sorted(done) == list(range(500))
    if count == 1:
        assert done == sorted(done)
    assert alive() == []


def test_each_thread_has_a_worker_of_its_own() -> None:
    """So that a worker may hold buffers and contexts."""
    owners: dict[int, set[int]] = {}
    barrier = threading.Barrier(3)

    def make_worker() -> Callable[[int], None]:
        seen = owners.setdefault(threading.get_ident(), set())

        def work(job: int) -> None:
            barrier.wait()  # each of three jobs needs a thread to itself
            seen.add(job)
            assert owners[threading.get_ident()] is seen

        return work

    group = WorkerGroup()
    group.start_many("work", 3, JobStream(iter(range(3))), make_worker)
    group.join()
    assert sorted(job for jobs in owners.values() for job in jobs) == [0, 1, 2]
    assert [len(jobs) for jobs in owners.values()] == [1, 1, 1]


def test_first_error_wins_after_all_threads_have_ended() -> None:
    """A second thread fails because the first did; only the first is told, once, and `on_stop` wakes the third."""
    failed, woken = threading.Event(), threading.Event()
    stops: list[str] = []

    def on_stop() -> None:
        stops.append(threading.current_thread().name)
        woken.set()

    def first() -> None:
        try:
            raise KeyError("first")
        finally:
            failed.set()

    def second() -> None:
        woken.wait()
        raise ValueError("second")

    group = WorkerGroup(on_stop)
    group.start("second", second)
    group.start("third", lambda: woken.wait() and None)
    group.start("first", first)
    with pytest.raises(KeyError, match="first"):
        group.join()
    assert stops == ["mmsplit-first"]
    assert group.is_stopping
    assert alive() == []


def test_error_ends_the_stream_for_all() -> None:
    """An endless stream: the others finish the job they have and begin no other."""
    group = WorkerGroup()

    def work(job: int) -> None:
        if job == 100:
            raise RuntimeError("job 100")

    jobs = iter(int, 1)  # zeros for ever
    group.start_many("work", 2, JobStream(jobs), lambda: work)
    group.start_many("fail", 1, JobStream(iter([100])), lambda: work)
    with pytest.raises(RuntimeError, match="job 100"):
        group.join()
    assert alive() == []


@pytest.mark.parametrize("where", ["worker", "jobs"])
def test_error_in_making_a_worker_or_a_job_is_an_error(where: str) -> None:
    """Whatever fails in a thread comes out of `join`."""

    def jobs():
        yield 1
        if where == "jobs":
            raise LookupError

    def make_worker() -> Callable[[int], None]:
        if where == "worker":
            raise LookupError
        return lambda _: None

    group = WorkerGroup()
    group.start_many("work", 2, JobStream(jobs()), make_worker)
    with pytest.raises(LookupError):
        group.join()
    assert alive() == []


def test_stopped_is_no_error() -> None:
    """A long job that asks `go_on` ends in silence; the error is the other thread's."""
    group = WorkerGroup()

    def long() -> None:
        while True:
            group.go_on()

    def fail() -> None:
        raise OSError("disk")

    group.go_on()
    group.start("long", long)
    group.start("fail", fail)
    with pytest.raises(OSError, match="disk"):
        group.join()
    with pytest.raises(Stopped):
        group.go_on()


@pytest.mark.skipif(os.name == "nt", reason="no signal can be sent to one thread there")
def test_interrupt_ends_all_threads_before_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the caller waits: `on_stop` once, all joined, then `KeyboardInterrupt`."""
    stops: list[str] = []
    group = WorkerGroup(lambda: stops.append(threading.current_thread().name))

    finished: list[int] = []
    real = WorkerGroup._join_all
    joining = [threading.Event()]

    def join_all(group: WorkerGroup) -> None:
        if joining:
            joining.pop().set()
        real(group)

    monkeypatch.setattr(WorkerGroup, "_join_all", join_all)
    begin = joining[0]

    def work() -> None:
        begin.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while not group.is_stopping:
            pass
        finished.append(sum(range(1_000_000)))  # work that is still to be done when the interrupt is seen

    group.start("work", work)
    group.start("idle", lambda: [None for _ in iter(lambda: group.is_stopping, True)] and None)
    with pytest.raises(KeyboardInterrupt):
        group.join()
    assert len(finished) == 1
    assert stops == ["MainThread"]
    assert alive() == []


def test_thread_that_cannot_be_started_ends_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on threads is met half-way: nobody works on behind the caller's back."""
    stops: list[int] = []
    group = WorkerGroup(lambda: stops.append(1))
    real = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        group.start_many("work", 5, JobStream(iter(int, 1)), lambda: lambda _: None)
    assert stops == [1]
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(RuntimeError, match="can't start"):
        group.join()


def test_progress_adds_up() -> None:
    """Each call tells what is done so far; without a callback nothing is counted."""
    told: list[Progress] = []
    counter = ProgressCounter("split", 10, told.append)
    counter.add(3)
    counter.add(7)
    assert told == [Progress("split", 3, 10), Progress("split", 10, 10)]
    ProgressCounter("split", 10, None).add(3)


def test_without_a_wish_there_are_as_many_threads_as_processors_but_not_very_many() -> None:
    """On a machine of many processors a container may have few; and buffers are per thread."""
    assert 1 <= thread_count(None) <= min(16, os.cpu_count() or 1)
    assert thread_count(40) == 40


@pytest.mark.parametrize("threads", [0, -1, -2, 1025, 1.5, "2", True])
def test_a_number_of_threads_that_is_none(threads: object) -> None:
    """Nothing would be done, and nobody would notice."""
    with pytest.raises(RequestError, match="1 to 1024"):
        thread_count(threads)  # type: ignore[arg-type]


def test_a_second_interrupt_does_not_leave_threads_behind() -> None:
    """Whoever interrupts twice still gets all threads ended before the call returns."""
    release = threading.Event()
    ended: list[int] = []

    def body() -> None:
        release.wait(10)
        ended.append(1)

    group = WorkerGroup()
    group.start("slow", body)
    waits: list[float] = []

    def interrupted_wait(timeout: float | None = None) -> bool:
        waits.append(1)
        if len(waits) <= 3:
            raise KeyboardInterrupt
        release.set()
        return wait(timeout)

    _, event = group._threads[0]
    wait = event.wait
    event.wait = interrupted_wait  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        group.join()
    assert ended == [1]
    assert alive() == []


def test_an_error_in_the_callers_block_ends_the_group() -> None:
    """In a `with` block nothing is left running, wherever the block was left."""
    started = threading.Event()

    def body() -> None:
        started.set()
        while not group.is_stopping:
            pass

    def leave_the_block(group: WorkerGroup) -> None:
        group.start("busy", body)
        started.wait()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), WorkerGroup() as group:
        leave_the_block(group)
    assert alive() == []
