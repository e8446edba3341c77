"""What threads hand to each other: buffers that go round, and results that come out in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

from mmsplit.workers import Stopped

T = TypeVar("T")


class Pool(Generic[T]):
    """Buffers that go round: whoever finds none waits until another thread gives one back."""

    def __init__(self, items: Iterable[T]) -> None:
        self._free = deque(items)
        self._changed = threading.Condition()
        self._cancelled = False

    def take(self) -> T:
        """Wait for an item and take it; raises `Stopped` if the pool is cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._free)
            if self._cancelled:
                raise Stopped
            return self._free.popleft()

    def give(self, item: T) -> None:
        """Give an item back."""
        with self._changed:
            self._free.append(item)
            self._changed.notify()

    def cancel(self) -> None:
        """End every thread that waits."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()


class OrderedQueue(Generic[T]):
    """Items 0, 1, 2 … that several threads put in any order and take in that of their numbers.

    It holds as many as it is given: what bounds them is the pool that their buffers come from.
    """

    def __init__(self) -> None:
        self._items: dict[int, T] = {}
        self._next = 0
        self._count: int | None = None
        self._changed = threading.Condition()
        self._cancelled = False

    def put(self, number: int, item: T) -> None:
        """Add item `number`; each number is put once."""
        with self._changed:
            self._items[number] = item
            self._changed.notify_all()

    def end(self, count: int) -> None:
        """Say that there are `count` items in all, some of which may be still to come."""
        with self._changed:
            self._count = count
            self._changed.notify_all()

    def take(self) -> tuple[int, T] | None:
        """Wait for the next item and take it, with its number; None after the last.

        Raises `Stopped` if the queue is cancelled.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._cancelled or self._next in self._items or self._next == self._count)
            if self._cancelled:
                raise Stopped
            if self._next == self._count:
                return None
            number, self._next = self._next, self._next + 1
            self._changed.notify_all()  # another thread may wait for the one that is next now
            return number, self._items.pop(number)

    def cancel(self) -> None:
        """End every thread that waits."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def drain(self) -> list[T]:
        """Return what nobody has taken, for those who must give it back."""
        with self._changed:
            left, self._items = list(self._items.values()), {}
            return left
