"""All files of one run, several at a time, each lane with a stream of spans of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeVar

from mmsplit.merging.lane import Lane
from mmsplit.merging.span import BlockSink, Span
from mmsplit.workers import JobStream, ProgressCounter, WorkerGroup

S = TypeVar("S", bound=BlockSink)

#: Threads that decode for one lane: hashing, which is one thread there, keeps no more of them busy.
_MOST_DECODERS: Final = 4


def write_files(
    sinks: Sequence[S],
    iter_spans: Callable[[S], Iterator[Span]],
    threads: int,
    counter: ProgressCounter,
    *,
    most_lanes: int | None = None,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Give each sink its spans, in order, file after file.

    `threads` decode and hash, at most `most_lanes` files at once; `on_stop` wakes whoever waits for the source.  Raises
    the first error of any thread, when all have ended; the sinks are the caller's to close.
    """
    if not sinks:
        return
    todo = JobStream(iter(sinks))

    def iter_lane() -> Iterator[Span]:
        while (sink := todo.take()) is not None:
            yield from iter_spans(sink)

    lane_count = min(len(sinks), (threads + 1) // 2, most_lanes or len(sinks))
    decoders = min(_MOST_DECODERS, -(-threads // lane_count))
    lanes = [Lane(iter_lane(), decoders, counter) for _ in range(lane_count)]

    def cancel() -> None:
        on_stop()
        for lane in lanes:
            lane.cancel()

    try:
        with WorkerGroup(cancel) as group:
            for lane in lanes:
                lane.start(group)
    finally:
        for lane in lanes:
            lane.close()
