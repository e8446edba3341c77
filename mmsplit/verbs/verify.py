"""`verify`: find every byte that is not as it was written, and say where it is."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

import xxhash

from mmsplit.checkpoint import Checkpoint, IoMode, Scratch, ShardRange, ShardReaders, iter_with_read_ahead
from mmsplit.errors import CheckpointError, FormatError, IntegrityError, RequestError
from mmsplit.remote.source import HubOptions, open_source
from mmsplit.sidecar.chunk_check import Wanted, check_chunks
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import TensorEntry
from mmsplit.sidecar.output_directory import STATE_NAME
from mmsplit.sidecar.parity_file import find_parity_faults
from mmsplit.sidecar.parity_layout import parity_name
from mmsplit.sidecar.partition_reader import Fault, OpenPartition, Report, read_partition_files
from mmsplit.sidecar.scrub_run import Scrub, ScrubRun
from mmsplit.sidecar.set_manifest import (
    SET_MANIFEST_NAME,
    FileEntry,
    PartitionEntry,
    SetManifest,
    is_as_written,
)
from mmsplit.sidecar.set_reader import read_set_manifest, resolve_set_path
from mmsplit.workers import JobStream, ProgressCallback, ProgressCounter, WorkerGroup, thread_count

#: quick: structure and sizes.  stored: and the checksum of every stored byte.  full: and decode it all.
Level = Literal["quick", "stored", "full"]

_EXTRA_THREADS: Final = 1


class VerifyResult(NamedTuple):
    """What a verification found; `ok` says that everything looked at is as it was written.

    `problems` are in file order.  `checked_bytes` counts payload bytes that were read.
    """

    ok: bool
    level: Level
    problems: tuple[Fault, ...]
    partition_count: int
    checked_bytes: int

    def as_json(self) -> dict[str, object]:
        """Return what `verify --json` shows."""
        return {
            "ok": self.ok,
            "level": self.level,
            "problems": [fault._asdict() for fault in self.problems],
            "partitions": self.partition_count,
            "checked_bytes": self.checked_bytes,
        }


def verify(
    path: str | Path,
    *,
    level: Level = "stored",
    against: str | Path | Checkpoint | None = None,
    hub: HubOptions | None = None,
    allow_unknown_dtypes: bool = False,
    scrub: Scrub | None = None,
    threads: int | None = None,
    io: IoMode = "auto",
    progress: ProgressCallback | None = None,
) -> VerifyResult:
    """Verify a partition set (its directory) or one partition (its manifest or payload).

    All damage is reported, not just the first.  With `against`, a path or a model of the Hub, the checkpoint there is
    compared with what the partitions say of it: header bytes, and the checksum of every tensor.  With `scrub` only
    some chunks are looked at, though all structure and small files, and what was done goes into a history.  Raises
    `FormatError` if there is nothing to verify or its version is not known here; damage is a result, not an error.
    """
    if level not in get_args(Level):
        raise RequestError(f"no such level: {level!r}", hint=f"Possible are {', '.join(get_args(Level))}.")
    root, only = resolve_set_path(Path(path))
    faults = _Faults()
    manifest = _set_manifest(root, only, faults.add)
    entries = _partition_manifests(root, only, manifest)
    source = None if against is None else open_source(against, hub, allow_unknown_dtypes=allow_unknown_dtypes)
    workers = thread_count(threads)
    part = None if scrub is None else _scrub_run(scrub, level, manifest, only, entries)
    counter = ProgressCounter("verify", _bytes_to_check(entries, level, source, part), progress)
    checked = 0
    if manifest is not None and source is not None:
        _compare_headers(manifest, source, faults.add)
    # One after the other: a set may have more partitions than may be open.
    for number, (entry_path, entry) in enumerate(entries):
        partition = _open(entry_path, entry, io, faults.add)
        if partition is not None:
            with partition:
                wanted: Wanted | None = None
                if level != "quick":
                    wanted = None if part is None else part.wanted(number, partition)
                    pace = None if part is None else part.pace
                    slots = check_chunks(
                        partition, workers, faults.add, counter, decode=level == "full", wanted=wanted, pace=pace
                    )
                    checked += slots
                    if part is None:  # header, index and copy were read at opening
                        counter.add(partition.reader.size_bytes - slots)
                _verify_parity(partition, entry, level, wanted, part, faults.add)
                if source is not None:
                    _verify_against(partition, source, workers, io, faults.add, counter)
    if manifest is not None and only is None:
        _verify_small_files(root, manifest.files, level, faults.add)
    problems = faults.in_order()
    if part is not None:
        part.finish(checked, problems)
    return VerifyResult(not problems, level, problems, len(entries), checked)


def _scrub_run(
    scrub: Scrub,
    level: Level,
    manifest: SetManifest | None,
    only: Path | None,
    entries: Sequence[tuple[Path, PartitionEntry | None]],
) -> ScrubRun:
    """Return the scrub; its places are counted by the lengths in the set manifest, where there is one."""
    sizes = [_size_of(path.with_suffix(".bin")) if entry is None else entry.payload_bytes for path, entry in entries]
    if only is None:
        return ScrubRun(scrub, level, None if manifest is None else manifest.root_digest, None, sizes)
    part_id = only.stem.rpartition("_")[2]
    return ScrubRun(scrub, level, _sha256_of(only), int(part_id) if part_id.isdecimal() else None, sizes)


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _bytes_to_check(
    entries: Sequence[tuple[Path, PartitionEntry | None]],
    level: Level,
    source: Checkpoint | None,
    part: ScrubRun | None,
) -> int:
    """About how much there is to do, for the progress."""
    payloads = (path.with_suffix(".bin") for path, _ in entries)
    if part is not None:
        stored = part.size_bytes
    else:
        stored = 0 if level == "quick" else sum(_size_of(path) for path in payloads)
    return stored + (0 if source is None else source.total_bytes)


class _Faults:
    """Collects faults from all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def in_order(self) -> tuple[Fault, ...]:
        return tuple(sorted(self._faults, key=lambda fault: (fault.file, fault.start or 0, fault.what)))


def _set_manifest(root: Path, only: Path | None, report: Report) -> SetManifest | None:
    if only is not None:
        return None
    try:
        manifest = read_set_manifest(root)
        if not is_as_written((root / SET_MANIFEST_NAME).read_bytes()):
            what = "set manifest says what was written, but not in the same bytes"
            report(Fault(str(root / SET_MANIFEST_NAME), what))
    except IntegrityError as error:
        report(Fault(str(root / SET_MANIFEST_NAME), error.what))
        return None
    except FormatError:
        # Without a set manifest its partitions may still be worth a look; without those there is nothing.
        if (root / SET_MANIFEST_NAME).exists() or (root / STATE_NAME).exists() or not _manifests_in(root):
            raise
        report(Fault(str(root / SET_MANIFEST_NAME), "set manifest is missing"))
        return None
    return manifest


def _manifests_in(root: Path) -> list[Path]:
    stems = {
        path.stem
        for path in root.glob("partition_*")
        if path.suffix in (".json", ".bin") and path.stem.removeprefix("partition_").isdecimal()
    }
    return sorted((root / f"{stem}.json" for stem in stems), key=lambda path: (len(path.name), path.name))


def _partition_manifests(
    root: Path, only: Path | None, manifest: SetManifest | None
) -> list[tuple[Path, PartitionEntry | None]]:
    if only is not None:
        return [(only, None)]
    if manifest is None:
        return [(path, None) for path in _manifests_in(root)]
    return [(root / entry.manifest_file, entry) for entry in manifest.partitions]


def _open(path: Path, entry: PartitionEntry | None, io: IoMode, report: Report) -> OpenPartition | None:
    """Open a partition, report what is wrong with its structure, and hold it to its entry in the set manifest."""
    part_id = None if entry is None else entry.part_id

    def report_here(fault: Fault) -> None:
        report(fault if fault.partition is not None else fault._replace(partition=part_id))

    try:
        partition = read_partition_files(path, report_here, io)
    except (IntegrityError, CheckpointError, FormatError) as error:
        # A CheckpointError says that a disk failed.  What a set of our version lists is ours, so if it does not look
        # like it, it is damaged; only of a file that stands alone may one say that it is foreign.
        if entry is None and isinstance(error, FormatError):
            raise
        report_here(Fault(error.path or str(path), error.what, error.offset))
        return None
    if entry is not None:
        if path.is_file() and _sha256_of(path) != entry.manifest_sha256:
            report_here(Fault(str(path), "manifest is not the one the set was made with", 0, path.stat().st_size))
        payload = path.parent / entry.payload_file
        if payload.is_file() and payload.stat().st_size != entry.payload_bytes:
            found = payload.stat().st_size
            what = f"payload has another size: expected {entry.payload_bytes:,} bytes, found {found:,}"
            report_here(Fault(str(payload), what, min(found, entry.payload_bytes), max(found, entry.payload_bytes)))
    return partition


def _verify_parity(
    partition: OpenPartition,
    entry: PartitionEntry | None,
    level: Level,
    wanted: Wanted | None,
    part: ScrubRun | None,
    report: Report,
) -> None:
    """Check the parity file, if there is one.  A scrub reads its blocks in the part that has the last chunk."""
    look = level != "quick" and (wanted is None or not len(wanted) or bool(wanted[-1]))
    part_id = partition.manifest.part_id
    found = find_parity_faults(
        partition.path.with_name(parity_name(part_id)),
        part_id,
        _sha256_of(partition.path) if entry is None else entry.manifest_sha256,
        look=look,
        pace=None if part is None else part.pace,
    )
    for fault in found:
        report(fault)


def _sha256_of(path: Path) -> str | None:
    """Digest of a file; None, which is no file's, if it cannot be read."""
    try:
        return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    except OSError:
        return None


def _verify_small_files(root: Path, files: Sequence[FileEntry], level: Level, report: Report) -> None:
    for entry in files:
        path = root / entry.name
        if not path.is_file():
            report(Fault(str(path), "file of the model is missing"))
        elif path.stat().st_size != entry.size_bytes:
            report(Fault(str(path), f"file of the model has another size: expected {entry.size_bytes:,} bytes"))
        elif level != "quick" and _sha256_of(path) != entry.sha256:
            report(Fault(str(path), "file of the model is not as it was written", 0, entry.size_bytes))


def _ranges_of(job: _SourceChunk) -> tuple[ShardRange, ...]:
    return (ShardRange(job.tensor.shard, job.start, job.stop),)


class _SourceChunk(NamedTuple):
    """Bytes [start, stop) of a source shard, and the checksum that the partition recorded for them."""

    partition: OpenPartition
    tensor: TensorEntry
    start: int
    stop: int
    raw_xxh3: int


def _verify_against(
    partition: OpenPartition,
    source: Checkpoint,
    threads: int,
    io: IoMode,
    report: Report,
    counter: ProgressCounter,
) -> None:
    part_id = partition.manifest.part_id
    if partition.tensors and not any(tensor.name in source.tensors for tensor in partition.tensors):
        what = f"not the checkpoint that partition {part_id} was made from: it has none of its tensors"
        report(Fault(source.location, what, partition=part_id))
        return
    with source.open_readers(io) as readers, WorkerGroup(readers.cancel) as group:

        def make_worker() -> Callable[[_SourceChunk], None]:
            scratch = Scratch()

            def work(job: _SourceChunk) -> None:
                what = _source_fault(job, readers, scratch)
                if what is not None:
                    file = source.location_of(job.tensor.shard)
                    report(Fault(file, what, job.start, job.stop, part_id, None, job.tensor.name))
                counter.add(job.stop - job.start)

            return work

        jobs = _iter_source_chunks(partition, source, report)
        chunks = JobStream(iter_with_read_ahead(jobs, readers, _ranges_of))
        group.start_many("compare", threads + _EXTRA_THREADS, chunks, make_worker)


def _source_fault(job: _SourceChunk, readers: ShardReaders, scratch: Scratch) -> str | None:
    """Return what is wrong with a chunk of the source, if anything; a file that fails is a finding, not the end."""
    try:
        with readers.lend(job.tensor.shard) as reader, reader.borrow(job.start, job.stop, scratch) as view:
            same = xxhash.xxh3_64_intdigest(view) == job.raw_xxh3
    except CheckpointError as error:
        return f"source cannot be compared: {error.what}"
    return None if same else "source bytes are not those that were split"


def _compare_headers(manifest: SetManifest, source: Checkpoint, report: Report) -> None:
    shards = {shard.name: shard for shard in source.shards}
    for entry in manifest.shards:
        shard = shards.pop(entry.name, None)
        if shard is None:
            report(Fault(source.location_of(entry.name), "source shard is missing"))
            continue
        if shard.size_bytes != entry.size_bytes:
            what = f"source shard has another size: expected {entry.size_bytes:,} bytes, found {shard.size_bytes:,}"
            report(Fault(shard.location, what, 0, shard.size_bytes))
        elif source.read_kept(entry.name) != entry.kept.data(entry.name):
            report(Fault(shard.location, "source header is not the one that was split", *shard.kept[0]))
    for shard in shards.values():
        report(Fault(shard.location, "source shard is not part of the set"))


def _iter_source_chunks(partition: OpenPartition, source: Checkpoint, report: Report) -> Iterator[_SourceChunk]:
    for tensor in partition.tensors:
        there = source.tensors.get(tensor.name)
        place = (tensor.shard, tensor.source_start, tensor.source_stop, tensor.dtype, tensor.shape)
        if there is None or place != (
            there.shard,
            there.start_offset,
            there.stop_offset,
            there.dtype,
            there.shape,
        ):
            what = "tensor is missing in the source" if there is None else "source has the tensor in another form"
            report(
                Fault(
                    source.location_of(tensor.shard),
                    what,
                    tensor.source_start,
                    tensor.source_stop,
                    partition.manifest.part_id,
                    None,
                    tensor.name,
                )
            )
            continue
        for number in range(tensor.chunk_count):
            record = partition.index[tensor.first_chunk + number]
            start = tensor.source_start + number * CHUNK_BYTES
            yield _SourceChunk(partition, tensor, start, start + int(record["raw_bytes"]), int(record["raw_xxh3"]))
