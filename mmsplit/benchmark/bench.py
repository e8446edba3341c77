"""`bench`: measure the parts and the whole on this machine, and say what limits it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

import mmsplit.benchmark.rates as rates
from mmsplit.benchmark.sample import choose_tensors, write_sample
from mmsplit.checkpoint import Checkpoint, Scratch, TensorInfo, open_checkpoint
from mmsplit.durable import make_directory, remove_empty
from mmsplit.errors import OutputError
from mmsplit.sidecar.output_directory import free_bytes
from mmsplit.sidecar.output_files import output_errors
from mmsplit.synthetic import write_synthetic_checkpoint
from mmsplit.verbs.load import open_set
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify
from mmsplit.workers import thread_count

#: Bytes of weights a bench works on unless told otherwise.
DEFAULT_SAMPLE_BYTES: Final = 1_000_000_000
#: Of each dtype, this much is encoded and decoded in memory.
_MEMORY_SAMPLE_BYTES: Final = 64 << 20
#: A thread more must bring this much to be recommended.
_WORTH_A_THREAD: Final = 1.05

_SYNTHETIC_SMALL_BYTES: Final = 260_000_000
_SYNTHETIC_FULL_BYTES: Final = 2_480_000_000

Say = Callable[[str], None]


class DtypeResult(NamedTuple):
    """One dtype, memory to memory, rates in raw bytes per second: of one thread, and of all."""

    dtype: str
    ratio: float
    encode_one: float
    encode_all: float
    decode_one: float
    decode_all: float


class BenchResult(NamedTuple):
    """What was measured.  All rates are bytes per second; those of split, verify and load are raw bytes.

    `cold` says whether the page cache could be emptied before reading.  `split_by_threads` maps a thread count to
    the rate of the whole split.
    """

    source: str
    sample_bytes: int
    threads: int
    cold: bool
    direct: bool
    copy: float
    checksum: float
    digest: float
    read: float
    write: float
    dtypes: tuple[DtypeResult, ...]
    split_by_threads: dict[int, float]
    ratio: float
    verify: float
    load: float

    @property
    def best_threads(self) -> int:
        """The smallest thread count that is within 5 % of the fastest split."""
        best = max(self.split_by_threads.values())
        return min(count for count, rate in self.split_by_threads.items() if rate * _WORTH_A_THREAD >= best)

    @property
    def limits(self) -> dict[str, float]:
        """How fast a split could be if one resource were all it needed, in raw bytes per second."""
        encode = sum(result.encode_all for result in self.dtypes) / len(self.dtypes)
        # One source shard is hashed by one thread, while the others encode.
        cpu = 1 / (1 / encode + 1 / (self.digest * self.threads))
        return {"disk": min(self.read, self.write / self.ratio), "processor": cpu, "memory": self.copy / 3}

    @property
    def bottleneck(self) -> str:
        """Which resource limits a split here: disk, processor or memory."""
        return min(self.limits, key=lambda name: self.limits[name])

    def seconds_for(self, model_bytes: int) -> dict[str, float]:
        """Estimate how long split, verify and load of a model of that size take here."""
        return {
            "split": model_bytes / self.split_by_threads[self.best_threads],
            "verify": model_bytes / self.verify,
            "load": model_bytes / self.load,
        }

    def as_json(self) -> dict[str, object]:
        """Return what `bench --json` shows."""
        return {
            **self._asdict(),
            "dtypes": [result._asdict() for result in self.dtypes],
            "best_threads": self.best_threads,
            "limits": self.limits,
            "bottleneck": self.bottleneck,
        }


def planned_write_bytes(sample_bytes: int = DEFAULT_SAMPLE_BYTES, *, synthetic: bool = True) -> int:
    """Most bytes a bench has on disk at once: the sample with its partitions, or with the checkpoint it is cut from."""
    made = _SYNTHETIC_FULL_BYTES if sample_bytes > _SYNTHETIC_SMALL_BYTES else _SYNTHETIC_SMALL_BYTES
    return sample_bytes + max(2 * sample_bytes, made if synthetic else 0)


def bench(
    source: str | Path | None = None,
    out: str | Path | None = None,
    *,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    threads: int | None = None,
    say: Say = lambda _: None,
) -> BenchResult:
    """Measure this machine on whole layers of `source` (default: a synthetic checkpoint), `sample_bytes` of them.

    Works in a new directory inside `out` (default: the system's place for temporary files) and removes it, whatever
    happens.  `say` is told each step.  Raises `NoSpaceError`, `OutputError`, `CheckpointError`.
    """
    base = Path(out) if out is not None else Path(tempfile.gettempdir())
    with output_errors(base):
        made = make_directory(base)
        work = Path(tempfile.mkdtemp(prefix="mmsplit-bench-", dir=base))
    try:
        return _bench(source, work, sample_bytes, thread_count(threads), say)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        remove_empty(made)


def _bench(source: str | Path | None, work: Path, sample_bytes: int, threads: int, say: Say) -> BenchResult:
    needed, free = planned_write_bytes(sample_bytes, synthetic=source is None), free_bytes(work)
    if free < needed:
        raise _no_space(work, needed, free)
    origin = None if source is None else open_checkpoint(source)
    say("making the sample")
    if origin is None:
        write_synthetic_checkpoint(work / "source", full=sample_bytes > _SYNTHETIC_SMALL_BYTES)
        full = open_checkpoint(work / "source")
    else:
        full = origin
    sample_path = write_sample(full, choose_tensors(full, sample_bytes), work / "sample")
    if origin is None:
        shutil.rmtree(work / "source")
    sample = open_checkpoint(work / "sample")

    say("reading")
    largest = Path(max((origin or sample).shards, key=lambda shard: shard.size_bytes).location)
    cold = rates.drop_from_cache(largest)
    read = rates.read_rate(largest, sample_bytes)
    say("writing")
    write, direct = rates.write_rate(work / "write", min(sample_bytes, sample.total_bytes))
    say("copying and hashing in memory")
    data = _bytes_of(sample, sample.tensors.values(), _MEMORY_SAMPLE_BYTES)
    copy, checksum, digest = rates.copy_rate(data), rates.checksum_rate(data), rates.digest_rate(data)
    dtypes = []
    for dtype in sorted({tensor.dtype for tensor in sample.tensors.values()}):
        say(f"encoding and decoding {dtype}")
        dtypes.append(_dtype_result(sample, dtype, threads))

    by_threads = {}
    for count in rates.thread_counts(threads):
        say(f"splitting with {count} thread{'s' if count > 1 else ''}")
        rates.drop_from_cache(sample_path)
        started = time.perf_counter()
        result = split(sample, work / "set", 2, threads=count, existing="force")
        by_threads[count] = sample.total_bytes / (time.perf_counter() - started)
    payloads = sorted((work / "set").glob("partition_*.bin"))
    say("verifying")
    verify_rate = _cold_rate(payloads, result.total_bytes, lambda: verify(work / "set", threads=threads))
    say("loading")
    load_rate = _cold_rate(payloads, result.total_bytes, lambda: _load_all(work / "set", threads))
    return BenchResult(
        source="synthetic" if source is None else str(source),
        sample_bytes=sample.total_bytes,
        threads=threads,
        cold=cold,
        direct=direct,
        copy=copy,
        checksum=checksum,
        digest=digest,
        read=read,
        write=write,
        dtypes=tuple(dtypes),
        split_by_threads=by_threads,
        ratio=result.stored_bytes / max(1, result.total_bytes),
        verify=verify_rate,
        load=load_rate,
    )


def _no_space(work: Path, needed: int, free: int) -> OutputError:
    from mmsplit.errors import NoSpaceError

    return NoSpaceError(
        "too little free space for the bench",
        path=work.parent,
        expected=f"{needed:,} bytes free",
        found=free,
        hint="Choose another place with --out, or a smaller --sample-gb.",
    )


def _bytes_of(checkpoint: Checkpoint, tensors: Iterable[TensorInfo], limit_bytes: int) -> memoryview:
    """Return the first bytes of the tensors, one after the other, up to the limit."""
    pieces = bytearray()
    scratch = Scratch()
    with checkpoint.open_readers() as readers:
        for tensor in tensors:
            stop = min(tensor.stop_offset, tensor.start_offset + limit_bytes - len(pieces))
            with (
                readers.lend(tensor.shard) as reader,
                reader.borrow(tensor.start_offset, stop, scratch) as view,
            ):
                pieces += view
            if len(pieces) >= limit_bytes:
                break
    return memoryview(pieces)


def _dtype_result(sample: Checkpoint, dtype: str, threads: int) -> DtypeResult:
    tensors = sorted((t for t in sample.tensors.values() if t.dtype == dtype), key=lambda t: -t.size_bytes)
    codec = rates.CodecRates(_bytes_of(sample, tensors, _MEMORY_SAMPLE_BYTES), dtype, "planes")
    encode_one, encode_all = codec.encode_rate(1), codec.encode_rate(threads)
    return DtypeResult(dtype, codec.ratio, encode_one, encode_all, codec.decode_rate(1), codec.decode_rate(threads))


def _cold_rate(files: Iterable[Path], raw_bytes: int, work: Callable[[], object]) -> float:
    for path in files:
        rates.drop_from_cache(path)
    started = time.perf_counter()
    work()
    return raw_bytes / (time.perf_counter() - started)


def _load_all(path: Path, threads: int) -> int:
    total = 0
    with open_set(path, threads=threads) as partitions:
        for number in range(partitions.num_parts):
            for array in partitions.partition(number).values():
                total += int(np.asarray(array).nbytes)
    return total
