"""`verify`: find every byte that is not as it was written, and say where it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

import xxhash

from mmsplit.checkpoint import (
    Checkpoint,
    IoMode,
    Scratch,
    ShardRange,
    ShardReaders,
    SourcePlace,
    TensorInfo,
    TensorRows,
    iter_with_read_ahead,
    slice_rows,
)
from mmsplit.digests import parse_root_digest, sha256_of
from mmsplit.errors import CheckpointError, FormatError, IntegrityError, RequestError
from mmsplit.regular_files import is_regular, read_regular
from mmsplit.remote.source import HubOptions, open_source
from mmsplit.sidecar.chunk_check import Wanted, check_chunks
from mmsplit.sidecar.layout import CHUNK_BYTES
from mmsplit.sidecar.manifest import manifest_name
from mmsplit.sidecar.output_directory import STATE_NAME
from mmsplit.sidecar.parity_file import find_parity_faults
from mmsplit.sidecar.parity_layout import parity_name
from mmsplit.sidecar.part_ids import part_ids_in
from mmsplit.sidecar.partition_reader import Fault, OpenPartition, Report, read_partition_files
from mmsplit.sidecar.scrub_run import Scrub, ScrubRun
from mmsplit.sidecar.set_manifest import (
    SET_MANIFEST_NAME,
    FileEntry,
    PartitionEntry,
    SetManifest,
    is_as_written,
)
from mmsplit.sidecar.set_reader import entry_of_file, read_set_manifest, resolve_set_path
from mmsplit.sidecar.signature import signed_root_digest
from mmsplit.sidecar.single_partitions import SinglePartitions, find_single_partitions
from mmsplit.workers import JobStream, ProgressCallback, ProgressCounter, WorkerGroup, thread_count

#: quick: structure and sizes.  stored: and the checksum of every stored byte.  full: and decode it all.
Level = Literal["quick", "stored", "full"]

_EXTRA_THREADS: Final = 1
_ANOTHER_MODEL: Final = "this is another model: the set's tensors are not in it, or in another form"
#: A source that has fewer than one in so many tensors in their dtype and shape is another model: small ones may agree.
_MOST_LIKE_A_STRANGER: Final = 10


class VerifyResult(NamedTuple):
    """What a verification found; `ok` says that everything looked at is as it was written.

    `problems` are in file order.  `checked_bytes` counts payload bytes that were read.  `root_digest` is the one that
    everything was held to; None if none was demanded.  `single` says which partitions were looked at each by itself,
    because the directory has some of a split, and no set manifest.
    """

    ok: bool
    level: Level
    problems: tuple[Fault, ...]
    partition_count: int
    checked_bytes: int
    root_digest: str | None = None
    single: SinglePartitions | None = None

    def as_json(self) -> dict[str, object]:
        """Return what `verify --json` shows."""
        return {
            "ok": self.ok,
            "level": self.level,
            "root_digest": self.root_digest,
            "problems": [fault._asdict() for fault in self.problems],
            "partitions": self.partition_count,
            "checked_bytes": self.checked_bytes,
            "single_partitions": None if self.single is None else self.single._asdict(),
        }


def verify(
    path: str | Path,
    *,
    level: Level = "stored",
    against: str | Path | Checkpoint | None = None,
    root_digest: str | None = None,
    signature: str | Path | None = None,
    public_key: str | Path | None = None,
    hub: HubOptions | None = None,
    allow_unknown_dtypes: bool = False,
    scrub: Scrub | None = None,
    threads: int | None = None,
    io: IoMode = "auto",
    progress: ProgressCallback | None = None,
) -> VerifyResult:
    """Verify a partition set (its directory) or one partition (its manifest or payload).

    A directory with some partitions of a split and no set manifest, as `split` with `only` makes it, has each of them
    verified by itself; where all of them are there, the set manifest is missed.

    All damage is reported, not just the first.  With `against`, a path or a model of the Hub, the checkpoint there is
    compared with what the partitions say of it: header bytes, and the checksum of every tensor.  With `scrub` only
    some chunks are looked at, though all structure and small files, and what was done goes into a history.

    With `root_digest` only that very set will do, and every chunk that is read is held to its digest; one partition
    needs the set manifest beside it for that, but no other partition.  Without one, chunks are held to their digests
    at level "full".  `signature` is a file that says which root digest is right: one of OpenSSF Model Signing, made
    with the private key to `public_key`.

    Raises `FormatError` if there is nothing to verify or its version is not known here, `IntegrityError` if the set
    is not that of `root_digest` or the signature is not right; other damage is a result, not an error.
    """
    if level not in get_args(Level):
        raise RequestError(f"no such level: {level!r}", hint=f"Possible are {', '.join(get_args(Level))}.")
    root, only = resolve_set_path(Path(path))
    faults = _Faults()
    if (signature is None) != (public_key is None):
        raise RequestError("a signature and the public key to it go together", hint="Give both, or neither.")
    if root_digest is not None:
        root_digest = parse_root_digest(root_digest)
    if signature is not None and public_key is not None:
        signed = signed_root_digest(root, Path(signature), Path(public_key))
        if root_digest not in (None, signed):
            raise IntegrityError("signature is of another set", path=signature, expected=root_digest, found=signed)
        root_digest = signed
    single = None
    if root_digest is None:
        manifest = None if only is not None else _set_manifest(root, faults.add)
        if only is None and manifest is None and not (root / SET_MANIFEST_NAME).exists():
            single = _single_partitions(root, faults.add)
    else:
        manifest = read_set_manifest(root, root_digest)
        _require_as_written(root, faults.add)
    entries = _partition_manifests(root, only, manifest)
    source = None if against is None else open_source(against, hub, allow_unknown_dtypes=allow_unknown_dtypes)
    workers = thread_count(threads)
    part = (
        None if scrub is None else _scrub_run(scrub, level, manifest, only, entries, is_bound=root_digest is not None)
    )
    counter = ProgressCounter("verify", _bytes_to_check(entries, level, source, part), progress)
    checked = 0
    strangers: list[Fault] = []
    # One after the other: a set may have more partitions than may be open.
    for number, (entry_path, entry) in enumerate(entries):
        partition = _open(entry_path, entry, io, faults.add, is_bound=root_digest is not None)
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
                stranger = None if source is None else _find_stranger(partition, source)
                if stranger is not None:
                    strangers.append(stranger)
                elif source is not None:
                    _verify_against(partition, source, workers, io, faults.add, counter)
    if source is not None and len(entries) == len(strangers) > 1:
        faults.add(strangers[0]._replace(what=_ANOTHER_MODEL, partition=None))
    else:
        for fault in strangers:
            faults.add(fault)
        if manifest is not None and source is not None:
            _compare_headers(manifest, source, faults.add)
    if manifest is not None and only is None:
        _verify_small_files(root, manifest.files, level, faults.add)
    problems = faults.in_order()
    if part is not None:
        part.finish(checked, problems)
    return VerifyResult(not problems, level, problems, len(entries), checked, root_digest, single)


def _scrub_run(
    scrub: Scrub,
    level: Level,
    manifest: SetManifest | None,
    only: Path | None,
    entries: Sequence[tuple[Path, PartitionEntry | None]],
    *,
    is_bound: bool,
) -> ScrubRun:
    """Return the scrub; its places are counted by the lengths in the set manifest, where there is one."""
    sizes = [_size_of(path.with_suffix(".bin")) if entry is None else entry.payload_bytes for path, entry in entries]
    if only is None:
        root_digest = None if manifest is None else manifest.root_digest
        return ScrubRun(scrub, level, root_digest, None, sizes, is_bound=is_bound)
    part_id = only.stem.rpartition("_")[2]
    number = int(part_id) if part_id.isdecimal() else None
    return ScrubRun(scrub, level, _sha256_of(only), number, sizes, is_bound=is_bound)


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


def _set_manifest(root: Path, report: Report) -> SetManifest | None:
    """Return the set manifest; None where it is damaged, which is reported, or not there."""
    try:
        manifest = read_set_manifest(root)
        _require_as_written(root, report)
    except IntegrityError as error:
        report(Fault(str(root / SET_MANIFEST_NAME), error.what))
        return None
    except FormatError:
        # Without a set manifest its partitions may still be worth a look; without those there is nothing.
        if (root / SET_MANIFEST_NAME).exists() or (root / STATE_NAME).exists() or not part_ids_in(root):
            raise
        return None
    return manifest


def _single_partitions(root: Path, report: Report) -> SinglePartitions | None:
    """Return which partitions are here by themselves; reports the set manifest as missing where there should be one."""
    found = find_single_partitions(root)
    if isinstance(found, str):
        report(Fault(str(root / SET_MANIFEST_NAME), found))
        return None
    return found


def _require_as_written(root: Path, report: Report) -> None:
    if not is_as_written(read_regular(root / SET_MANIFEST_NAME)):
        what = "set manifest says what was written, but not in the same bytes"
        report(Fault(str(root / SET_MANIFEST_NAME), what))


def _partition_manifests(
    root: Path, only: Path | None, manifest: SetManifest | None
) -> list[tuple[Path, PartitionEntry | None]]:
    if only is not None:
        return [(only, None if manifest is None else entry_of_file(manifest, only))]
    if manifest is None:
        return [(root / manifest_name(part_id), None) for part_id in part_ids_in(root)]
    return [(root / entry.manifest_file, entry) for entry in manifest.partitions]


def _open(
    path: Path, entry: PartitionEntry | None, io: IoMode, report: Report, *, is_bound: bool
) -> OpenPartition | None:
    """Open a partition, report what is wrong with its structure, and hold it to its entry in the set manifest."""
    part_id = None if entry is None else entry.part_id

    def report_here(fault: Fault) -> None:
        report(fault if fault.partition is not None else fault._replace(partition=part_id))

    try:
        partition = read_partition_files(path, report_here, io, entry, is_bound=is_bound)
    except (IntegrityError, CheckpointError, FormatError) as error:
        # A CheckpointError says that a disk failed.  What a set of our version lists is ours, so if it does not look
        # like it, it is damaged; only of a file that stands alone may one say that it is foreign.
        if entry is None and isinstance(error, FormatError):
            raise
        report_here(Fault(error.path or str(path), error.what, error.offset))
        return None
    if entry is not None:
        payload = path.parent / entry.payload_file
        is_another = partition is not None and partition.manifest.part_id != entry.part_id
        if not is_another and payload.is_file() and payload.stat().st_size != entry.payload_bytes:
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
    # Not that of a payload that is out of place: that one is looked at in its turn.
    part_id = partition.manifest.part_id if entry is None else entry.part_id
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
        return sha256_of(read_regular(path))
    except OSError:
        return None


def _verify_small_files(root: Path, files: Sequence[FileEntry], level: Level, report: Report) -> None:
    for entry in files:
        path = root / entry.name
        if not is_regular(path):
            report(Fault(str(path), "file of the model is missing"))
        elif path.stat().st_size != entry.size_bytes:
            report(Fault(str(path), f"file of the model has another size: expected {entry.size_bytes:,} bytes"))
        elif level != "quick" and _sha256_of(path) != entry.sha256:
            report(Fault(str(path), "file of the model is not as it was written", 0, entry.size_bytes))


def _ranges_of(job: _SourceChunk) -> tuple[ShardRange, ...]:
    return (ShardRange(job.place.shard, job.start, job.stop),)


class _SourceChunk(NamedTuple):
    """Bytes [start, stop) of a source shard, within the place of a tensor, and the checksum recorded for them."""

    place: SourcePlace
    start: int
    stop: int
    raw_xxh3: int


def _find_stranger(partition: OpenPartition, source: Checkpoint) -> Fault | None:
    """Return the one fault to be told of a source that is not the one that was split at all, instead of all others."""
    found = 0
    for tensor in partition.tensors:
        for place in tensor.places():
            there = _in_source(place, tensor.rows, source)
            found += there is not None and (there.dtype, there.shape) == (tensor.dtype, tensor.shape)
    if not partition.tensors or found * _MOST_LIKE_A_STRANGER >= len(partition.tensors):
        return None
    part_id = partition.manifest.part_id
    what = (
        f"this is another model than partition {part_id} was made from: its tensors are not in it, or in another form"
    )
    return Fault(source.location, what, partition=part_id)


def _verify_against(
    partition: OpenPartition,
    source: Checkpoint,
    threads: int,
    io: IoMode,
    report: Report,
    counter: ProgressCounter,
) -> None:
    part_id = partition.manifest.part_id
    with source.open_readers(io) as readers, WorkerGroup(readers.cancel) as group:

        def make_worker() -> Callable[[_SourceChunk], None]:
            scratch = Scratch()

            def work(job: _SourceChunk) -> None:
                what = _source_fault(job, readers, scratch)
                if what is not None:
                    file = source.location_of(job.place.shard)
                    report(Fault(file, what, job.start, job.stop, part_id, None, job.place.name))
                counter.add(job.stop - job.start)

            return work

        jobs = _iter_source_chunks(partition, source, report)
        chunks = JobStream(iter_with_read_ahead(jobs, readers, _ranges_of))
        group.start_many("compare", threads + _EXTRA_THREADS, chunks, make_worker)


def _source_fault(job: _SourceChunk, readers: ShardReaders, scratch: Scratch) -> str | None:
    """Return what is wrong with a chunk of the source, if anything; a file that fails is a finding, not the end."""
    try:
        with readers.lend(job.place.shard) as reader, reader.borrow(job.start, job.stop, scratch) as view:
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


def _in_source(place: SourcePlace, rows: TensorRows | None, source: Checkpoint) -> TensorInfo | None:
    """Return the tensor of that name in the source, or the rows of it that a slice has."""
    whole = source.tensors.get(place.name)
    if whole is None or rows is None or whole.shape != rows.shape:
        return whole
    return slice_rows(whole, rows.start, rows.stop)


def _iter_source_chunks(partition: OpenPartition, source: Checkpoint, report: Report) -> Iterator[_SourceChunk]:
    for tensor in partition.tensors:
        for place in tensor.places():
            there = _in_source(place, tensor.rows, source)
            expected = (*place, tensor.dtype, tensor.shape)
            if there is None or expected != (
                there.name,
                there.shard,
                there.start_offset,
                there.stop_offset,
                there.dtype,
                there.shape,
            ):
                what = "tensor is missing in the source" if there is None else "source has the tensor in another form"
                report(
                    Fault(
                        source.location_of(place.shard),
                        what,
                        place.start_offset,
                        place.stop_offset,
                        partition.manifest.part_id,
                        None,
                        place.name,
                    )
                )
                continue
            for number in range(tensor.chunk_count):
                record = partition.index[tensor.first_chunk + number]
                start = place.start_offset + number * CHUNK_BYTES
                yield _SourceChunk(place, start, start + int(record["raw_bytes"]), int(record["raw_xxh3"]))
