"""One file after the other through four stages: read ahead, decode, hash in order, write in order.

What is hashed is the memory that is written, so a file is read back from nowhere.  Hashing is one stream and slower
than decoding: several files at once, each in a lane of its own, are what uses many processors.

Nobody waits in a circle.  A thread takes the room for a span before it takes the span, and spans are handed out in
order: so the earliest span that is not written has its room, and everything before it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from mmsplit.checkpoint.prefetcher import Prefetcher
from mmsplit.codec import ChunkDecoder
from mmsplit.merging.span import Span
from mmsplit.queues import OrderedQueue, Pool
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.shard_writer import ShardBlock
from mmsplit.workers import ProgressCounter, WorkerGroup

#: Spans read ahead, and blocks that are hashed, written or waiting for it, besides one for each that decodes.
_READ_AHEAD: Final = 4
_BEHIND: Final = 3


class Lane:
    """Makes files from a stream of spans, one after the other."""

    def __init__(self, spans: Iterator[Span], decoders: int, counter: ProgressCounter) -> None:
        self._decoders = decoders
        self._counter = counter
        self._prefetcher = Prefetcher(spans, lambda span, scratch: span.borrow(scratch), decoders + _READ_AHEAD)
        self._blocks = Pool([ShardBlock(CHUNK_BYTES) for _ in range(decoders + _BEHIND)])
        self._decoded: OrderedQueue[tuple[Span, ShardBlock]] = OrderedQueue()
        self._hashed: OrderedQueue[tuple[Span, ShardBlock]] = OrderedQueue()

    def start(self, group: WorkerGroup) -> None:
        """Start the threads of all stages."""
        self._prefetcher.start(group)
        for number in range(self._decoders):
            group.start(f"decode-{number}", self._decode)
        group.start("hash", self._hash)
        group.start("write", self._write)

    def cancel(self) -> None:
        """End every thread that waits."""
        self._prefetcher.cancel()
        self._blocks.cancel()
        self._decoded.cancel()
        self._hashed.cancel()

    def close(self) -> None:
        """Give back what is left; no thread may be working."""
        self._prefetcher.close()

    def _decode(self) -> None:
        decoder = ChunkDecoder()
        while True:
            block = self._blocks.take()
            loan = self._prefetcher.take()
            if loan is None:
                self._blocks.give(block)
                self._decoded.end(self._prefetcher.job_count)
                return
            with loan:
                loan.job.fill(block, loan.data, decoder)
            self._decoded.put(loan.number, (loan.job, block))

    def _hash(self) -> None:
        while (taken := self._decoded.take()) is not None:
            number, (span, block) = taken
            span.sink.hash(block)
            self._hashed.put(number, (span, block))
        self._hashed.end(self._prefetcher.job_count)

    def _write(self) -> None:
        while (taken := self._hashed.take()) is not None:
            span, block = taken[1]
            size_bytes = len(block.data)
            span.sink.write(block)
            self._blocks.give(block)
            self._counter.add(size_bytes)
