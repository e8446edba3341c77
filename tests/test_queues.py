"""What threads hand to each other: nothing is lost, the order holds, and nobody waits for ever."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from mmsplit.queues import OrderedQueue, Pool
from mmsplit.workers import Stopped, WorkerGroup


def test_items_come_out_in_the_order_of_their_numbers() -> None:
    """However they are put, and with None at the end as often as it is asked for."""
    numbers = list(range(300))
    random.Random(1).shuffle(numbers)
    queue: OrderedQueue[str] = OrderedQueue()
    taken: list[tuple[int, str]] = []

    def take() -> None:
        while (item := queue.take()) is not None:
            taken.append(item)

    with WorkerGroup(queue.cancel) as group:
        group.start("take", take)
        for number in numbers:
            queue.put(number, f"item {number}")
        queue.end(300)
    assert taken == [(number, f"item {number}") for number in range(300)]
    assert queue.take() is None


def test_several_takers_share_the_items() -> None:
    """Each item goes to exactly one, and all of them see the end."""
    queue: OrderedQueue[int] = OrderedQueue()
    taken: list[int] = []

    def take() -> None:
        while (item := queue.take()) is not None:
            taken.append(item[1])

    with WorkerGroup(queue.cancel) as group:
        for _ in range(3):
            group.start("take", take)
        for number in reversed(range(100)):
            queue.put(number, number)
        queue.end(100)
    assert sorted(taken) == list(range(100))


def test_the_end_may_be_known_before_the_last_item() -> None:
    """It says how many there are, not that all are there."""
    queue: OrderedQueue[str] = OrderedQueue()
    queue.end(1)
    queue.put(0, "last")
    assert queue.take() == (0, "last")
    assert queue.take() is None


def test_what_nobody_took_can_be_had_back() -> None:
    """Once."""
    queue: OrderedQueue[str] = OrderedQueue()
    queue.put(1, "b")
    queue.put(0, "a")
    assert queue.take() == (0, "a")
    assert queue.drain() == ["b"]
    assert queue.drain() == []


def test_a_pool_lends_what_it_has_and_no_more() -> None:
    """With two buffers no more than two threads have one, and all get their turn."""
    pool, lock = Pool([bytearray(1), bytearray(1)]), threading.Lock()
    in_use: set[int] = set()
    turns: list[int] = []

    def work() -> None:
        for _ in range(50):
            item = pool.take()
            with lock:
                assert id(item) not in in_use
                in_use.add(id(item))
                turns.append(len(in_use))
            with lock:
                in_use.remove(id(item))
            pool.give(item)

    with WorkerGroup(pool.cancel) as group:
        for _ in range(4):
            group.start("work", work)
    assert len(turns) == 200
    assert max(turns) <= 2


@pytest.mark.parametrize("make", [OrderedQueue, lambda: Pool([])], ids=["queue", "pool"])
def test_cancelling_ends_those_who_wait_and_those_who_come(make: Callable[[], OrderedQueue[int] | Pool[int]]) -> None:
    """They raise `Stopped`, which a group swallows: the error is elsewhere."""
    waited_on = make()
    ended = []

    def wait() -> None:
        try:
            waited_on.take()
        except Stopped:
            ended.append(True)
            raise

    with WorkerGroup(waited_on.cancel) as group:
        for _ in range(3):
            group.start("wait", wait)
        waited_on.cancel()
    assert len(ended) == 3
    with pytest.raises(Stopped):
        waited_on.take()
