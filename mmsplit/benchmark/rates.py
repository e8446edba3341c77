"""Single measurements: how many bytes per second one part of the work moves, the rest left out.

Each returns raw bytes per second.  Short ones are repeated, and the median counts.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from mmsplit.checkpoint import FileReader, Scratch, aligned_buffer
from mmsplit.codec import ChunkDecoder, ChunkEncoder, CodecName, Encoded
from mmsplit.sidecar.layout import CHUNK_BYTES, SLOT_BYTES
from mmsplit.sidecar.payload_file import PayloadFile
from mmsplit.workers import JobStream, WorkerGroup

_REPEATS: Final = 5
_READ_BYTES: Final = 8 << 20
_READERS: Final = 3


def copy_rate(data: memoryview) -> float:
    """Memory to memory: the ceiling of everything."""
    source = np.frombuffer(data, np.uint8)
    target = np.empty_like(source)

    def copy() -> None:
        target[:] = source

    return len(data) / _median_seconds(copy)


def checksum_rate(data: memoryview) -> float:
    """xxh3-64, one thread."""
    return len(data) / _median_seconds(lambda: xxhash.xxh3_64_intdigest(data))


def digest_rate(data: memoryview) -> float:
    """SHA-256, one thread."""
    return len(data) / _median_seconds(lambda: hashlib.sha256(data).digest())


def drop_from_cache(path: Path) -> bool:
    """Ask the kernel to forget a file's pages; returns whether this system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    fd = os.open(path, os.O_RDONLY)
    try:
        if os.access(path, os.W_OK):
            os.fsync(fd)  # dirty pages would stay
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return True


def read_rate(path: Path, limit_bytes: int) -> float:
    """Read the start of a file, up to `limit_bytes`, as split does; from the disk if the cache does not have it."""
    with FileReader(path) as reader:
        size = min(reader.size_bytes, limit_bytes)

        def make_worker() -> Callable[[int], None]:
            scratch = Scratch()

            def work(start: int) -> None:
                reader.will_need(start + _READERS * _READ_BYTES, start + 2 * _READERS * _READ_BYTES)
                with reader.borrow(start, min(start + _READ_BYTES, size), scratch) as view:
                    xxhash.xxh3_64_intdigest(view)

            return work

        started = time.perf_counter()
        with WorkerGroup() as group:
            group.start_many("read", _READERS, JobStream(iter(range(0, size, _READ_BYTES))), make_worker)
        return size / (time.perf_counter() - started)


def write_rate(path: Path, size_bytes: int, *, direct: bool = True) -> tuple[float, bool]:
    """Write a file as split writes payloads, sync it, remove it; returns the rate and whether it was O_DIRECT."""
    block = memoryview(aligned_buffer(SLOT_BYTES))
    np.frombuffer(block, np.uint8)[:] = np.random.default_rng(0).integers(0, 256, SLOT_BYTES, np.uint8)
    file = PayloadFile(path, direct=direct)
    try:
        started = time.perf_counter()
        blocks = JobStream(iter(range(0, size_bytes, SLOT_BYTES)))
        with WorkerGroup() as group:
            group.start_many("write", 2, blocks, lambda: lambda offset: file.write_block(offset, block))
        file.finish(size_bytes)
        return size_bytes / (time.perf_counter() - started), file.is_direct
    finally:
        file.close()
        path.unlink(missing_ok=True)


class CodecRates:
    """Encoding and decoding of the same chunks by a number of threads, memory to memory, checksums included."""

    def __init__(self, data: memoryview, dtype: str, codec: CodecName) -> None:
        self._chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
        self._dtype = dtype
        self._codec = codec
        self._encoded: list[tuple[bytes, Encoded]] = [(b"", Encoded(0, 0, 0))] * len(self._chunks)
        self.raw_bytes = len(data)

    def encode_rate(self, threads: int) -> float:
        """Raw bytes per second; also keeps the result for `decode_rate`."""

        def make_worker() -> Callable[[int], None]:
            encoder = ChunkEncoder(self._codec, CHUNK_BYTES)
            out = memoryview(aligned_buffer(CHUNK_BYTES))

            def work(number: int) -> None:
                raw = self._chunks[number]
                xxhash.xxh3_64_intdigest(raw)
                encoded = encoder.encode(raw, self._dtype, out)
                stored = out[: encoded.stored_bytes]
                xxhash.xxh3_64_intdigest(stored)
                if self._encoded[number][1].stored_bytes != encoded.stored_bytes:
                    self._encoded[number] = (bytes(stored), encoded)

            return work

        return self._run(threads, make_worker)

    def decode_rate(self, threads: int) -> float:
        """Raw bytes per second."""

        def make_worker() -> Callable[[int], None]:
            decoder = ChunkDecoder()
            out = memoryview(aligned_buffer(CHUNK_BYTES))

            def work(number: int) -> None:
                stored, encoded = self._encoded[number]
                target = out[: len(self._chunks[number])]
                decoder.decode(memoryview(stored), encoded, target)
                xxhash.xxh3_64_intdigest(target)

            return work

        return self._run(threads, make_worker)

    @property
    def ratio(self) -> float:
        """Stored by raw bytes."""
        return sum(encoded.stored_bytes for _, encoded in self._encoded) / self.raw_bytes

    def _run(self, threads: int, make_worker: Callable[[], Callable[[int], None]]) -> float:
        # Workers are made once, outside the clock: contexts and buffers live as long as a split.
        workers = [make_worker() for _ in range(threads)]

        def once() -> None:
            ready = iter(workers)
            lock = threading.Lock()

            def take_worker() -> Callable[[int], None]:
                with lock:
                    return next(ready)

            with WorkerGroup() as group:
                group.start_many("codec", threads, JobStream(iter(range(len(self._chunks)))), take_worker)

        once()
        return self.raw_bytes / _median_seconds(once, 3)


def _median_seconds(work: Callable[[], object], repeats: int = _REPEATS) -> float:
    seconds: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def thread_counts(most: int) -> Sequence[int]:
    """1, 2, 4 … up to the number of processors, and that number itself."""
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return [*counts, most] if most > 1 else counts
