"""`split`: stream a checkpoint into partitions.

One stream of slots runs through a few threads.  Each takes the next slot, borrows the source bytes, encodes them into
a page-aligned block of its own, learns the slot's place from the writer, writes it there.  More threads exist than
may encode at once, so that reading and writing of some overlap with the encoding of others.  Beside them, one thread
or more hash the source shards from end to end: merge will need their SHA-256.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple, get_args

import xxhash

from mmsplit.checkpoint import Checkpoint, IoMode, Scratch, Shard, ShardHasher, ShardReaders, open_checkpoint
from mmsplit.codec import CODEC_NAMES, ENCODER, CodecName
from mmsplit.errors import OutputExistsError, RequestError, SourceChangedError
from mmsplit.planning import (
    By,
    Plan,
    PlannedPartition,
    PlanRequest,
    TiedMode,
    iter_stored,
    plan_checkpoint,
)
from mmsplit.sidecar.chunk_copier import ChunkCopier
from mmsplit.sidecar.framing import pack_header
from mmsplit.sidecar.layout import CHUNK_BYTES, DATA_START, Slot, iter_slots, largest_payload_bytes
from mmsplit.sidecar.manifest import format_manifest, manifest_name, parse_manifest, payload_name
from mmsplit.sidecar.manifest_builder import Origin, build_manifest
from mmsplit.sidecar.output_directory import Existing, OutputDirectory, free_bytes
from mmsplit.sidecar.payload_writer import PayloadWriter
from mmsplit.sidecar.repeated_chunks import RepeatedChunks
from mmsplit.sidecar.set_manifest import (
    SET_MANIFEST_NAME,
    FileEntry,
    KeptBytes,
    PartitionEntry,
    SetManifest,
    ShardEntry,
    format_set_manifest,
    parse_set_manifest,
)
from mmsplit.sidecar.set_reader import open_partition_of_set
from mmsplit.sidecar.slot_encoder import SlotEncoder
from mmsplit.sidecar.small_files import copy_small_files, read_small_files, require_free_names
from mmsplit.workers import (
    JobStream,
    ProgressCallback,
    ProgressCounter,
    WorkerGroup,
    thread_count,
)

#: Threads beyond those that encode: while they wait for the disk, the others have work.
_EXTRA_THREADS: Final = 2
_EXISTING: Final = ", ".join(get_args(Existing))
#: How many slots ahead the kernel is asked to read.
_READ_AHEAD_SLOTS: Final = 16
#: Slots encoded on trial when the free space is less than the worst case.
_SPACE_SAMPLES: Final = 24
_SPACE_MARGIN: Final = 1.03
_MANIFEST_BYTES_PER_TENSOR: Final = 512


class SplitResult(NamedTuple):
    """What a split made.  `resumed_bytes` of the raw bytes were there already; `root_digest` stands for the set."""

    path: Path
    plan: Plan
    manifest: SetManifest
    resumed_bytes: int
    already_finished: bool

    @property
    def root_digest(self) -> str:
        """The set's root digest."""
        return self.manifest.root_digest

    def as_json(self) -> dict[str, object]:
        """Return what `split --json` shows."""
        return {
            "path": str(self.path),
            "root_digest": self.root_digest,
            "already_finished": self.already_finished,
            "resumed_bytes": self.resumed_bytes,
            "total_bytes": self.manifest.total_bytes,
            "stored_bytes": self.manifest.stored_bytes,
            "partitions": [entry._asdict() for entry in self.manifest.partitions],
            "notes": list(self.plan.notes),
        }


@dataclass(frozen=True, kw_only=True)
class _Options:
    codec: CodecName
    threads: int
    io: IoMode
    direct: bool
    source_sha256: bool


class _Job(NamedTuple):
    """One slot of one partition."""

    part: _PartitionRun
    slot: Slot


def split(
    source: str | Path | Checkpoint,
    output: str | Path,
    num_parts: int | None = None,
    *,
    by: By = "bytes",
    weights: Sequence[float | str] | None = None,
    boundaries: Sequence[str] | None = None,
    tied: TiedMode = "duplicate",
    codec: CodecName = "planes",
    threads: int | None = None,
    existing: Existing = "refuse",
    io: IoMode = "auto",
    direct: bool = True,
    source_sha256: bool = True,
    model_id: str | None = None,
    revision: str | None = None,
    allow_unknown_dtypes: bool = False,
    progress: ProgressCallback | None = None,
) -> SplitResult:
    """Split a checkpoint into a partition set in `output`; memory does not grow with its size.

    Planning arguments are those of `PlanRequest`.  `threads` encode (default: all processors); the result does not
    depend on it.  `existing` says what to do about output that is there: "refuse", "resume" an unfinished run (start
    one where there is none, do nothing where it is finished), or "force", which replaces what mmsplit wrote.
    `direct=False` keeps O_DIRECT away from the output.  `model_id` and `revision` go into the manifests.
    `source_sha256=False` saves hashing the source shards from end to end, a third of the processor time: merge can
    then compare no digest but one that the Hub publishes, and where there is none it has the checksums of the chunks.

    Interrupted at any moment, it leaves the source untouched, nothing that passes for a partition set, and what a
    later run with `existing="resume"` needs to come to the same bytes.  Raises any branch of `MmsplitError`.
    """
    if existing not in get_args(Existing):
        raise RequestError(f"no such way with existing output: {existing!r}", hint=f"Possible are {_EXISTING}.")
    if codec not in CODEC_NAMES:
        raise RequestError(f"no such codec: {codec!r}", hint=f"Possible are {', '.join(CODEC_NAMES)}.")
    if not isinstance(source, Checkpoint):
        source = open_checkpoint(source, allow_unknown_dtypes=allow_unknown_dtypes)
    plan = plan_checkpoint(
        source, PlanRequest(num_parts=num_parts, by=by, weights=weights, boundaries=boundaries, tied=tied)
    )
    options = _Options(codec=codec, threads=thread_count(threads), io=io, direct=direct, source_sha256=source_sha256)
    headers = {shard.name: source.read_header(shard.name) for shard in source.shards}
    origin = Origin(
        model_id or source.model_id,
        revision or source.revision,
        plan.num_parts,
        plan.digest,
        _source_digest(source, headers),
    )
    kept = {name: KeptBytes.of(headers.pop(name)) for name in list(headers)}
    if Path(output).resolve() == Path(source.location).resolve():
        raise RequestError(
            "output is the directory of the source, which is only read",
            path=output,
            hint="Choose another directory for the partition set.",
        )
    with OutputDirectory(Path(output)) as out:
        run = _SplitRun(source, plan, origin, options, out, kept, progress)
        return run.execute(existing)


def _source_digest(checkpoint: Checkpoint, headers: dict[str, bytes]) -> str:
    """SHA-256 over what the headers say: name, length and header bytes of each shard, in name order."""
    digest = hashlib.sha256()
    for shard in checkpoint.shards:
        for item in (shard.name.encode(), str(shard.size_bytes).encode(), headers[shard.name]):
            digest.update(len(item).to_bytes(8, "little"))
            digest.update(item)
    return f"sha256:{digest.hexdigest()}"


class _PartitionRun:
    """One partition on its way: its writer, and its completion when the last slot is written."""

    def __init__(self, partition: PlannedPartition, origin: Origin, out: Path, direct: bool) -> None:
        self.partition = partition
        self._origin = origin
        self.manifest_path = out / manifest_name(partition.part_id)
        self.payload_path = out / payload_name(partition.part_id)
        self.chunk_count = self.slot_count = 0
        for slot in self.slots():
            self.slot_count += 1
            self.chunk_count += len(slot.chunks)
        header = pack_header(partition.part_id, origin.num_parts, origin.plan_digest, origin.source_digest)
        self.writer = PayloadWriter(self.payload_path, header, self.chunk_count, self.slot_count, direct=direct)

    def slots(self) -> Iterator[Slot]:
        return iter_slots(iter_stored(self.partition))

    def intact_bytes(self) -> int:
        """Raw bytes that an earlier run stored and `writer` found intact."""
        if self.writer.is_finished:
            return self.partition.total_bytes
        return sum(slot.raw_bytes for slot in islice(self.slots(), self.writer.recovered_slots))

    def largest_bytes(self) -> int:
        return largest_payload_bytes(self.partition.total_bytes, self.chunk_count, self.slot_count)

    def entry(self) -> PartitionEntry:
        """What the set manifest says of a finished partition."""
        data = self.manifest_path.read_bytes()
        manifest = parse_manifest(data, str(self.manifest_path))
        return PartitionEntry(
            part_id=self.partition.part_id,
            manifest_file=self.manifest_path.name,
            manifest_sha256=f"sha256:{hashlib.sha256(data).hexdigest()}",
            payload_file=self.payload_path.name,
            payload_bytes=self.payload_path.stat().st_size,
            total_params=manifest.total_params,
            total_bytes=manifest.total_bytes,
            stored_bytes=manifest.stored_bytes,
        )

    def finish(self) -> None:
        writer = self.writer
        manifest = build_manifest(
            self.partition, self._origin, self.payload_path.name, writer.index, DATA_START, writer.data_stop
        )
        writer.finish(format_manifest(manifest), self.manifest_path)


class _SplitRun:
    """One call of `split`: what is there, what is missing, the threads that make it, the set manifest."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        origin: Origin,
        options: _Options,
        out: OutputDirectory,
        kept_headers: dict[str, KeptBytes],
        progress: ProgressCallback | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._origin = origin
        self._options = options
        self._out = out
        self._kept_headers = kept_headers
        self._progress = progress
        self._state_lock = threading.Lock()
        self._shard_sha256: dict[str, str] = {}
        self._files: dict[str, list[str]] = {}
        self._resumed_bytes = 0

    def execute(self, existing: Existing) -> SplitResult:
        found = self._out.prepare(self._identity(), existing)
        if found == "finished":
            path = self._out.path / SET_MANIFEST_NAME
            manifest = parse_set_manifest(path.read_bytes(), str(path))
            _require_same_weights(self._checkpoint, self._out.path, manifest)
            self._require_digests(manifest)
            return SplitResult(self._out.path, self._plan, manifest, self._planned_bytes(), True)
        parts = [
            _PartitionRun(part, self._origin, self._out.path, self._options.direct) for part in self._plan.partitions
        ]
        if found == "unfinished":
            self._recover(parts)
        with self._checkpoint.open_readers(self._options.io) as readers:
            self._require_space(parts, readers)
            root = Path(self._checkpoint.location)
            files = read_small_files(root, self._checkpoint.small_files)
            if found == "unfinished":
                self._require_same_small_files(files)
            require_free_names(self._out.path, files, self._out.small_files)
            self._out.remove_own_files()
            # The state first: a file that is copied is ours, and a later run must know it.
            before = self._out.small_files or {}
            self._files = {e.name: sorted({e.sha256, *before.get(e.name, ())}) for e in files}
            self._write_state()
            copy_small_files(root, files, self._out.path)
            try:
                self._stream(parts, readers)
            finally:
                for part in parts:
                    part.writer.close()
        for shard in self._checkpoint.shards:
            self._checkpoint.open_shard(shard.name, "pread").close()  # raises if it changed meanwhile
        manifest = self._set_manifest(parts, files)
        self._out.finish(format_set_manifest(manifest))
        return SplitResult(self._out.path, self._plan, manifest, self._resumed_bytes, False)

    def _identity(self) -> dict[str, object]:
        return {
            "source": self._origin.source_digest,
            "plan": self._origin.plan_digest,
            "codec": self._options.codec,
            "model_id": self._origin.model_id,
            "revision": self._origin.revision,
            "encoder": ENCODER,
        }

    def _write_state(self) -> None:
        fingerprints = {shard.name: list(shard.identity) for shard in self._checkpoint.shards}
        known = {"fingerprints": fingerprints, "files": self._files, "shard_sha256": self._shard_sha256}
        self._out.write_state({**self._identity(), **known})

    def _planned_bytes(self) -> int:
        return sum(part.total_bytes for part in self._plan.partitions)

    def _recover(self, parts: Sequence[_PartitionRun]) -> None:
        """Re-hash what an unfinished run left: whole partitions, and the leading slots of unfinished ones."""
        state = self._out.read_state()
        fingerprints = state.get("fingerprints")
        for shard in self._checkpoint.shards:
            before = fingerprints.get(shard.name) if isinstance(fingerprints, dict) else None
            if before != list(shard.identity):
                raise SourceChangedError(
                    "shard is not the one the unfinished split read: it was changed, copied or moved since",
                    path=shard.location,
                    expected=f"size, time, inode, device {before}",
                    found=f"{list(shard.identity)}",
                    hint="What is finished cannot be trusted to be of this file; use --force to start again.",
                )
        digests = state.get("shard_sha256")
        self._shard_sha256 = dict(digests) if isinstance(digests, dict) else {}
        counter = ProgressCounter("re-hash", self._planned_bytes(), self._progress)
        for part in parts:
            if not part.writer.adopt_finished(
                part.slots(), part.manifest_path, lambda slot: counter.add(slot.raw_bytes)
            ):
                part.writer.recover(part.slots(), lambda slot: counter.add(slot.raw_bytes))
            self._resumed_bytes += part.intact_bytes()

    def _require_same_small_files(self, files: Sequence[FileEntry]) -> None:
        recorded = self._out.small_files or {}
        for entry in files:
            if entry.sha256 not in recorded.get(entry.name, (entry.sha256,)):
                raise SourceChangedError(
                    "file of the model is not the one the unfinished split copied",
                    path=self._checkpoint.location_of(entry.name),
                    hint="Bring it back, or use --force to start again.",
                )

    def _stream(self, parts: Sequence[_PartitionRun], readers: ShardReaders) -> None:
        unfinished = [part for part in parts if not part.writer.is_finished]

        def cancel() -> None:
            for part in unfinished:
                part.writer.cancel()

        counter = ProgressCounter("split", self._planned_bytes(), self._progress)
        counter.add(self._resumed_bytes)
        threads = self._options.threads
        permits = threading.Semaphore(threads)

        def make_encoder() -> Callable[[_Job], None]:
            encoder = SlotEncoder(readers, self._options.codec, permits, copier)
            return lambda job: _encode_and_write(job, encoder, counter)

        copier = self._copier(parts)
        slots = JobStream(_with_read_ahead(_iter_jobs(unfinished), readers, copier))
        to_hash = self._checkpoint.shards if self._options.source_sha256 else ()
        shards = JobStream(shard.name for shard in to_hash if shard.name not in self._shard_sha256)
        with copier, WorkerGroup(cancel) as group:

            def make_hasher() -> Callable[[str], None]:
                hasher = ShardHasher(self._checkpoint, readers, group.go_on)
                return lambda shard: self._record_sha256(shard, hasher.sha256(shard))

            group.start_many("encode", threads + _EXTRA_THREADS, slots, make_encoder)
            group.start_many("hash", max(1, threads // 2), shards, make_hasher)

    def _copier(self, parts: Sequence[_PartitionRun]) -> ChunkCopier:
        writers = {part.partition.part_id: part.writer for part in parts}
        repeated = RepeatedChunks(part.partition for part in parts)
        return ChunkCopier(repeated, writers, direct=self._options.direct)

    def _record_sha256(self, shard: str, digest: str) -> None:
        with self._state_lock:
            self._shard_sha256[shard] = digest
            self._write_state()

    def _require_space(self, parts: Sequence[_PartitionRun], readers: ShardReaders) -> None:
        """Refuse before the first byte if the set cannot fit; measure the ratio only if the worst case would not."""
        tensor_count = sum(len(layer.tensors) for part in self._plan.partitions for layer in part.layers)
        extra = tensor_count * _MANIFEST_BYTES_PER_TENSOR
        extra += sum(self._checkpoint.storage.file_bytes(name) or 0 for name in self._checkpoint.small_files)
        worst = sum(part.largest_bytes() for part in parts if not part.writer.is_finished)
        if free_bytes(self._out.path) + self._out.reclaimable_bytes >= worst + extra:
            return
        done = sum(part.writer.data_stop for part in parts if not part.writer.is_finished)
        ratio = min(1.0, _sample_ratio(parts, readers, self._options.codec) * _SPACE_MARGIN)
        self._out.require_space(int(worst * ratio) - done + extra, "the partition set")

    def _set_manifest(self, parts: Sequence[_PartitionRun], files: tuple[FileEntry, ...]) -> SetManifest:
        checkpoint = self._checkpoint
        index = None if checkpoint.index_name is None else (checkpoint.index_name, KeptBytes.of(checkpoint.index_bytes))
        return SetManifest(
            model_id=self._origin.model_id,
            revision=self._origin.revision,
            plan_digest=self._origin.plan_digest,
            source_digest=self._origin.source_digest,
            codec=self._options.codec,
            tied=self._plan.tied,
            shards=tuple(self._shard_entry(shard) for shard in checkpoint.shards),
            weights_index=index,
            files=files,
            partitions=tuple(part.entry() for part in parts),
        )

    def _shard_entry(self, shard: Shard) -> ShardEntry:
        header = self._kept_headers[shard.name]
        if self._options.source_sha256:
            return ShardEntry(shard.name, shard.size_bytes, self._shard_sha256[shard.name], header)
        published = self._checkpoint.published_sha256(shard.name)
        if published is None:
            return ShardEntry(shard.name, shard.size_bytes, None, header)
        return ShardEntry(shard.name, shard.size_bytes, f"sha256:{published}", header, sha256_is_published=True)

    def _require_digests(self, manifest: SetManifest) -> None:
        """Raise if a finished set has no SHA-256 of the source although this run was to compute it."""
        if self._options.source_sha256 and any(shard.sha256 is None for shard in manifest.shards):
            raise OutputExistsError(
                "output holds a finished partition set without the SHA-256 of its source",
                path=self._out.path,
                hint="Split without the SHA-256 of the source, too, or use --force to split again.",
            )


def _require_same_weights(checkpoint: Checkpoint, root: Path, manifest: SetManifest) -> None:
    """Compare a chunk of each layer with the source: a fine-tune has the same headers as its base model.

    To compare all would be to read all; whoever must be sure verifies the set against the source.
    """
    scratch = Scratch()
    with checkpoint.open_readers("pread") as readers:
        for entry in manifest.partitions:
            with open_partition_of_set(root, manifest, entry.part_id, "pread") as partition:
                for layer in partition.manifest.layers:
                    tensor = max(layer.tensors, key=lambda tensor: tensor.chunk_count, default=None)
                    if tensor is None or tensor.chunk_count == 0:
                        continue
                    chunk = tensor.first_chunk + tensor.chunk_count // 2
                    record = partition.index[chunk]
                    start = tensor.source_start + (chunk - tensor.first_chunk) * CHUNK_BYTES
                    with (
                        readers.lend(tensor.shard) as reader,
                        reader.borrow(start, start + int(record["raw_bytes"]), scratch) as raw,
                    ):
                        same = xxhash.xxh3_64_intdigest(raw) == int(record["raw_xxh3"])
                    if not same:
                        raise OutputExistsError(
                            "output holds a finished partition set of a source with other weights",
                            path=root,
                            tensor=tensor.name,
                            hint="Choose another directory, or use --force to replace it.",
                        )


def _iter_jobs(parts: Sequence[_PartitionRun]) -> Iterator[_Job]:
    for part in parts:
        part.writer.open()
        if part.writer.is_complete:  # nothing to store, or killed between the last slot and the end
            part.finish()
            continue
        for slot in part.slots():
            if slot.number >= part.writer.recovered_slots:
                yield _Job(part, slot)


def _with_read_ahead(jobs: Iterator[_Job], readers: ShardReaders, copier: ChunkCopier) -> Iterator[_Job]:
    """Pass jobs on, telling the kernel about each some time before it is handed out."""
    waiting: deque[_Job] = deque()
    for job in jobs:
        for chunk in job.slot.chunks:
            if copier.is_copied(job.part.partition.part_id, chunk):
                continue
            start = chunk.tensor.start_offset + chunk.start
            with readers.lend(chunk.tensor.shard) as reader:
                reader.will_need(start, start + chunk.raw_bytes)
        waiting.append(job)
        if len(waiting) > _READ_AHEAD_SLOTS:
            yield waiting.popleft()
    yield from waiting


def _encode_and_write(job: _Job, encoder: SlotEncoder, counter: ProgressCounter) -> None:
    encoded = encoder.encode(job.part.partition.part_id, job.slot)
    writer = job.part.writer
    offset = writer.place(job.slot.number, encoded.stored_bytes)
    if writer.write(job.slot.number, job.slot.first_chunk, offset, encoded.block, encoded.records):
        job.part.finish()
    counter.add(job.slot.raw_bytes)


def _sample_ratio(parts: Sequence[_PartitionRun], readers: ShardReaders, codec: CodecName) -> float:
    """Encode slots spread over the whole plan on trial; return stored by raw bytes."""
    every = max(1, sum(part.slot_count for part in parts) // _SPACE_SAMPLES)
    encoder = SlotEncoder(readers, codec, threading.Semaphore(1))
    raw = stored = 0
    slots = ((part.partition.part_id, slot) for part in parts for slot in part.slots())
    for number, (part_id, slot) in enumerate(slots):
        if number % every == 0:
            raw += slot.raw_bytes
            stored += len(encoder.encode(part_id, slot).block)
    return stored / raw if raw else 1.0
