"""One call of `split`: what is there, what is missing, the threads that make it, the set manifest.

One stream of slots runs through a few threads.  Each takes the next slot, borrows the source bytes, encodes them into
a page-aligned block of its own, learns the slot's place from the writer, writes it there.  More threads exist than
may encode at once, so that reading and writing of some overlap with the encoding of others.  Beside them, one thread
or more compute the SHA-256 of the source shards: of a local shard from its file, of one that came over the network
from what the finished partitions give back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Final

from mmsplit.checkpoint import Checkpoint, Shard, ShardHasher, ShardRange, ShardReaders, iter_with_read_ahead
from mmsplit.codec import ENCODER
from mmsplit.digests import is_sha256
from mmsplit.errors import IntegrityError, OutputExistsError
from mmsplit.planning import Plan
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.chunk_copier import ChunkCopier, StoredChunks
from mmsplit.sidecar.manifest import manifest_name
from mmsplit.sidecar.manifest_builder import Origin
from mmsplit.sidecar.output_directory import DELETED_KEY, KEPT_SOURCE_KEY, Existing, OutputDirectory, free_bytes
from mmsplit.sidecar.output_files import write_whole_file
from mmsplit.sidecar.partition_reader import OpenPartition, open_partition_files
from mmsplit.sidecar.repeated_chunks import RepeatedChunks
from mmsplit.sidecar.set_manifest import (
    SET_MANIFEST_NAME,
    FileEntry,
    KeptBytes,
    SetManifest,
    ShardEntry,
    format_set_manifest,
    parse_set_manifest,
)
from mmsplit.sidecar.set_reader import open_partition_of_set
from mmsplit.sidecar.slot_encoder import SlotEncoder
from mmsplit.sidecar.small_files import copy_small_files, read_small_files, require_free_names
from mmsplit.splitting.consumer import Consumer
from mmsplit.splitting.parity_of_split import ParityOfSplit
from mmsplit.splitting.partition_run import PartitionRun, entry_of
from mmsplit.splitting.same_source import require_same_shards, require_same_small_files
from mmsplit.splitting.same_weights import require_same_codec, require_same_weights
from mmsplit.splitting.slot_jobs import SlotJob, iter_jobs, make_slot, ranges_of
from mmsplit.splitting.source_set import SourceSet
from mmsplit.splitting.space import SpaceCheck
from mmsplit.splitting.split_result import SplitOptions, SplitResult
from mmsplit.splitting.stored_shards import StoredShard, StoredShardHasher, find_stored_shards
from mmsplit.workers import JobStream, ProgressCallback, ProgressCounter, WorkerGroup

#: Threads beyond those that encode: while they wait for the disk, the others have work.
_EXTRA_THREADS: Final = 2
#: The same where chunks are taken from a set: nearly all the time is spent in waiting for writes, and a disk is faster
#: the more of them it has (measured: 8 at once took 5 to 15 % less time than 4, in 6 of 6 pairs).
_EXTRA_THREADS_TO_COPY: Final = 6


class SplitRun:
    """Writes the partitions of a plan to a directory that is locked for it; `execute` is called once.

    `known` is what the set manifest will say of each shard; a SHA-256 that it lacks is computed if `options` say so.
    With `source_set` the checkpoint is one that a partition set stands for, and its encoded chunks are taken.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        origin: Origin,
        options: SplitOptions,
        out: OutputDirectory,
        known: Mapping[str, ShardEntry],
        progress: ProgressCallback | None,
        source_set: SourceSet | None = None,
        consumer: Consumer | None = None,
    ) -> None:
        self._consumer = consumer
        self._checkpoint = checkpoint
        self._plan = plan
        self._origin = origin
        self._options = options
        self._out = out
        self._known = known
        self._progress = progress
        self._source_set = source_set
        self._state_lock = threading.Lock()
        self._shard_sha256: dict[str, str] = {}
        self._distrusted: set[str] = set()
        self._parity = ParityOfSplit(out.path, options.parity, options.threads, progress)
        self._files: dict[str, list[str]] = {}
        self._resumed_bytes = 0
        self._needed_bytes = 0
        self._checks_what_is_stored = self._is_remote and source_set is None

    def execute(self, existing: Existing) -> SplitResult:
        """Write what is missing, parity last.  Raises any branch of `MmsplitError`."""
        result = self._write_set(existing)
        self._parity.make(entry.part_id for entry in result.partitions)
        return result

    def _write_set(self, existing: Existing) -> SplitResult:
        found = self._out.prepare(self._identity(), existing, self._options.only)
        if found == "finished":
            manifest = self._finished_set()
            if self._consumer is not None:
                part_ids = [entry.part_id for entry in manifest.partitions]
                self._consumer.foretell(part_ids, [], self._parity.missing_bytes(part_ids), free_bytes(self._out.path))
                self._parity.make(part_ids)
                self._consumer.consume_finished(manifest, self._options.io, self._options.threads)
                # Until the last is deleted, a state says that the set is the only copy.
                self._files = {entry.name: [entry.sha256] for entry in manifest.files}
                self._shard_sha256 = {s.name: s.sha256 for s in manifest.shards if s.sha256 is not None}
                self._consumer.deletable |= self._consumer.gone
                self._write_state()
                self._consumer.delete_proven()
                self._out.finish_partitions()
            return self._result(manifest, already_finished=True)
        runs = [
            PartitionRun(partition, self._origin, self._out.path, self._options.direct)
            for partition in self._plan.partitions
            if self._is_wanted(partition.part_id)
        ]
        if found != "nothing":
            self._recover(runs)
        self._require_fitting_partitions(runs)
        with self._checkpoint.open_readers(self._options.io) as readers:
            checked = SpaceCheck(self._checkpoint, self._out, self._options.codec, runs, readers, self._parity)
            if self._consumer is None:
                checked.require_space(self._source_set)
            else:
                checked.foretell(self._consumer)
            files = read_small_files(self._checkpoint.storage, self._checkpoint.small_files)
            if found == "unfinished":
                require_same_small_files(self._checkpoint, files, self._out.small_files or {})
            require_free_names(self._out.path, files, self._out.small_files)
            self._out.remove_own_files()
            # The state first: a file that is copied is ours, and a later run must know it.
            before = self._out.small_files or {}
            self._files = {e.name: sorted({e.sha256, *before.get(e.name, ())}) for e in files}
            self._write_state()
            copy_small_files(self._checkpoint.storage, files, self._out.path)
            try:
                self._make(runs, readers)
            finally:
                for run in runs:
                    run.writer.close()
        self._checkpoint.storage.require_unchanged(
            {shard.name: shard.identity for shard in self._checkpoint.shards if shard.name not in self._gone}
        )
        if self._missing_after(runs):
            self._out.finish_partitions()
            return self._result(None)
        manifest = self._set_manifest(files)
        if self._consumer is not None:
            # The state goes last: until then nobody replaces the set (`require_no_only_copy`).
            write_whole_file(self._out.path / SET_MANIFEST_NAME, format_set_manifest(manifest))
            self._consumer.delete_proven()
        self._out.finish(format_set_manifest(manifest))
        return self._result(manifest)

    @property
    def _gone(self) -> Collection[str]:
        """Shards that are deleted by now."""
        return () if self._consumer is None else self._consumer.gone

    @property
    def _is_remote(self) -> bool:
        return self._checkpoint.storage.directory is None

    def _is_wanted(self, part_id: int) -> bool:
        return self._options.only is None or part_id in self._options.only

    def _missing_after(self, runs: Sequence[PartitionRun]) -> set[int]:
        """Ids of the partitions that the set will still lack when `runs` are done."""
        have = {run.partition.part_id for run in runs} | self._out.neighbours
        return set(range(self._plan.num_parts)) - have

    def _result(self, manifest: SetManifest | None, *, already_finished: bool = False) -> SplitResult:
        wanted = [part.part_id for part in self._plan.partitions if self._is_wanted(part.part_id)]
        return SplitResult(
            path=self._out.path,
            plan=self._plan,
            partitions=tuple(entry_of(self._out.path, part_id) for part_id in wanted),
            manifest=manifest,
            resumed_bytes=self._planned_bytes() if already_finished else self._resumed_bytes,
            already_finished=already_finished,
            needed_bytes=self._needed_bytes,
            moved_bytes=self._checkpoint.storage.moved_bytes,
            disk=None if self._consumer is None else self._consumer.disk,
            deleted=() if self._consumer is None else self._consumer.deleted_now,
        )

    def _finished_set(self) -> SetManifest:
        path = self._out.path / SET_MANIFEST_NAME
        manifest = parse_set_manifest(read_regular(path), str(path))
        for entry in manifest.partitions:
            with open_partition_of_set(self._out.path, manifest, entry.part_id, "pread") as partition:
                self._require_same_weights(partition)
        if any(shard.sha256 is None and self._needs_sha256(shard.name) for shard in manifest.shards):
            raise OutputExistsError(
                "output holds a finished partition set without the SHA-256 of its source",
                path=self._out.path,
                hint="Split without the SHA-256 of the source, too, or use --force to split again.",
            )
        return manifest

    def _needs_sha256(self, shard: str) -> bool:
        return self._options.source_sha256 or self._known[shard].sha256 is not None

    def _identity(self) -> dict[str, object]:
        return {
            "source": self._origin.source_digest,
            "plan": self._origin.plan_digest,
            "codec": self._options.codec,
            "model_id": self._origin.model_id,
            "revision": self._origin.revision,
            "encoder": ENCODER,
            "only": None if self._options.only is None else list(self._options.only),
        }

    def _write_state(self) -> None:
        known = {
            "fingerprints": {shard.name: list(shard.identity) for shard in self._checkpoint.shards},
            "files": self._files,
            "shard_sha256": self._shard_sha256,
            "distrusted": sorted(self._distrusted),
            "published": {
                shard.name: self._checkpoint.published_sha256(shard.name) for shard in self._checkpoint.shards
            },
            "checks_what_is_stored": self._checks_what_is_stored,
        }
        if self._consumer is not None:
            known |= {KEPT_SOURCE_KEY: self._consumer.journal, DELETED_KEY: sorted(self._consumer.deletable)}
        self._out.write_state({**self._identity(), **known})

    def _planned_bytes(self) -> int:
        return sum(part.total_bytes for part in self._plan.partitions if self._is_wanted(part.part_id))

    def _recover(self, runs: Sequence[PartitionRun]) -> None:
        """Re-hash what an earlier run left: whole partitions, and the leading slots of unfinished ones."""
        state = self._out.read_state()
        if state:
            require_same_shards(self._checkpoint, state, partial(self._is_same_by_digest, state))
            # Bytes of an earlier run may have come over the network, although the cache has the shards by now.
            self._checks_what_is_stored |= state.get("checks_what_is_stored") is True
        digests, distrusted = state.get("shard_sha256"), state.get("distrusted")
        digests = digests.items() if isinstance(digests, dict) else ()
        self._shard_sha256 = {name: digest for name, digest in digests if isinstance(digest, str) and is_sha256(digest)}
        if self._consumer is not None:
            # A shard that is there is deleted for what it is, not for what a state says that it was.
            self._shard_sha256 = {name: digest for name, digest in self._shard_sha256.items() if name in self._gone}
        distrusted = distrusted if isinstance(distrusted, list) else ()
        self._distrusted = {name for name in distrusted if isinstance(name, str)}
        counter = ProgressCounter("re-hash", self._planned_bytes(), self._progress)
        for run in runs:
            is_only_copy = self._consumer is not None and self._consumer.is_only_copy(run.partition.part_id)
            self._resumed_bytes += run.recover(
                self._distrusted, lambda slot: counter.add(slot.raw_bytes), is_only_copy=is_only_copy
            )
            if self._checks_what_is_stored and not run.writer.is_finished:
                # What is made again must be checked again.
                for shard in run.shards():
                    self._shard_sha256.pop(shard, None)

    def _require_fitting_partitions(self, runs: Sequence[PartitionRun]) -> None:
        """Hold finished partitions that this run did not make, and no state speaks for, to codec and weights."""
        adopted = {run.partition.part_id for run in runs if run.writer.is_finished}
        for part_id in sorted(self._out.neighbours | adopted):
            with open_partition_files(self._out.path / manifest_name(part_id), "pread") as partition:
                require_same_codec(partition, self._options.codec)
                self._require_same_weights(partition)

    def _require_same_weights(self, partition: OpenPartition) -> None:
        if not self._is_remote or self._source_set is not None:  # a commit has no other weights
            require_same_weights(self._checkpoint, partition, self._gone)

    def _is_same_by_digest(self, state: Mapping[str, object], shard: str) -> bool:
        """Whether a shard of a source that is consumed, copied or moved since, has the SHA-256 that was recorded.

        To start again is no way out there: other shards are deleted.
        """
        digests = state.get("shard_sha256")
        if self._consumer is None or not isinstance(digests, dict) or shard not in digests:
            return False
        found = self._consumer.sha256_of_files([shard], self._options.io, 1)
        return found == {shard: digests[shard]}

    def _make(self, runs: Sequence[PartitionRun], readers: ShardReaders) -> None:
        """Write what is missing: all in one stream, or, where shards are deleted, partition by partition."""
        to_check = self._shards_to_check(runs) if self._checks_what_is_stored else []
        checked_bytes = sum(stored.shard.size_bytes - stored.shard.kept_bytes for stored in to_check)
        consumer = self._consumer
        if consumer is not None:
            checked_bytes = consumer.bytes_to_prove
        counter = ProgressCounter(
            "copy" if self._source_set else "split", self._planned_bytes() + checked_bytes, self._progress
        )
        counter.add(self._resumed_bytes)
        unfinished = [run for run in runs if not run.writer.is_finished]
        if consumer is None:
            self._stream(runs, unfinished, to_check, readers, counter)
            return
        finished = {run.partition.part_id for run in runs if run.writer.is_finished}
        # Shards that are complete already go before more is written.  Their digests are computed first, those of all.
        steps: list[list[PartitionRun]] = ([[]] if finished else []) + [[run] for run in unfinished]
        for number, step in enumerate(steps, 1):
            self._stream(runs, step, [], readers, counter)
            finished |= {run.partition.part_id for run in step}
            # Before a shard goes its partitions can mend themselves, if they are to be able to.
            self._parity.make(sorted(finished))
            consumer.prove(finished, self._shard_sha256, self._options.threads, counter.add, self._distrust)
            self._write_state()
            if number < len(steps):
                consumer.delete_proven(readers)

    def _stream(
        self,
        runs: Sequence[PartitionRun],
        unfinished: Sequence[PartitionRun],
        to_check: Sequence[StoredShard],
        readers: ShardReaders,
        counter: ProgressCounter,
    ) -> None:
        def cancel() -> None:
            readers.cancel()
            for run in unfinished:
                run.writer.cancel()

        threads = self._options.threads
        permits = threading.Semaphore(threads)
        stored = self._stored_chunks(runs, readers)

        def make_encoder() -> Callable[[SlotJob], None]:
            encoder = SlotEncoder(readers, self._options.codec, permits, stored)
            return lambda job: make_slot(job, encoder, stored, counter)

        jobs = iter_with_read_ahead(iter_jobs(unfinished), readers, lambda job: self._count(job, stored))
        with closing(stored), WorkerGroup(cancel) as group:

            def make_hasher() -> Callable[[Shard], None]:
                hasher = ShardHasher(self._checkpoint, readers, group.go_on)
                return lambda shard: self._record_sha256(shard.name, hasher.sha256(shard.name))

            def make_checker() -> Callable[[StoredShard], None]:
                hasher = StoredShardHasher(self._out.path, self._kept_of, group.go_on)
                return lambda stored: self._check(stored, runs, hasher, counter.add)

            extra = _EXTRA_THREADS if self._source_set is None else _EXTRA_THREADS_TO_COPY
            group.start_many("encode", threads + extra, JobStream(jobs), make_encoder)
            if self._checks_what_is_stored:
                group.start_many("check", threads, JobStream(iter(to_check)), make_checker)
            else:
                group.start_many("hash", max(1, threads // 2), JobStream(iter(self._shards_to_hash(runs))), make_hasher)

    def _count(self, job: SlotJob, stored: StoredChunks) -> Sequence[ShardRange]:
        ranges = tuple(ranges_of(job, stored))
        self._needed_bytes += sum(stop - start for _, start, stop in ranges)
        return ranges

    def _stored_chunks(self, runs: Sequence[PartitionRun], readers: ShardReaders) -> StoredChunks:
        if self._source_set is not None:
            return self._source_set.chunks(readers)
        writers = {run.partition.part_id: run.writer for run in runs}
        repeated = RepeatedChunks(run.partition for run in runs)
        return ChunkCopier(repeated, writers, direct=self._options.direct)

    def _distrust(self, shard: str) -> None:
        """Let a later run make again what holds bytes of a shard, and hash the shard again."""
        with self._state_lock:
            self._shard_sha256.pop(shard, None)
            self._distrusted.add(shard)
            self._write_state()

    def _shards_to_hash(self, runs: Sequence[PartitionRun]) -> list[Shard]:
        """Shards of this machine whose digest the set manifest is going to need."""
        if not self._options.source_sha256 or self._missing_after(runs):
            return []
        return [shard for shard in self._checkpoint.shards if shard.name not in self._shard_sha256]

    def _shards_to_check(self, runs: Sequence[PartitionRun]) -> list[StoredShard]:
        """Shards from the network that come back as a whole from the partitions that will be here."""
        if not self._options.source_sha256:
            return []
        here = self._out.neighbours | {run.partition.part_id for run in runs}
        partitions = [partition for partition in self._plan.partitions if partition.part_id in here]
        stored = find_stored_shards(self._checkpoint.shards, partitions)
        return [item for item in stored if item.shard.name not in self._shard_sha256]

    def _kept_of(self, shard: str) -> bytes:
        return self._known[shard].kept.data(shard)

    def _check(
        self,
        stored: StoredShard,
        runs: Collection[PartitionRun],
        hasher: StoredShardHasher,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Hold what the partitions give back of a shard to the digest that the Hub publishes."""
        for run in runs:
            if run.partition.part_id in stored.part_ids:
                run.writer.wait_until_finished()
        found = hasher.sha256(stored, on_bytes)
        name = stored.shard.name
        published = self._checkpoint.published_sha256(name)
        if found is None or published not in (None, found):
            with self._state_lock:
                self._distrusted.add(name)
                self._write_state()
            raise IntegrityError(
                "what arrived of this shard is not what the Hub has: its SHA-256 is not the published one",
                path=stored.shard.location,
                expected=published,
                found=found or "copies of a tied weight that differ",
                hint=self._fetch_again_hint(stored, runs),
            )
        self._record_sha256(name, f"sha256:{found}")

    def _fetch_again_hint(self, stored: StoredShard, runs: Collection[PartitionRun]) -> str:
        others = sorted(set(stored.part_ids) - {run.partition.part_id for run in runs})
        if others:
            these = ",".join(map(str, stored.part_ids))
            return f"It may have come with an earlier run: fetch these partitions again with --only {these} --force."
        return (
            "Run the same command again with --resume: what came of this shard is fetched anew."
            " With --keep-source, first let mmsplit download --verify mend the cache."
        )

    def _record_sha256(self, shard: str, digest: str) -> None:
        with self._state_lock:
            self._shard_sha256[shard] = digest
            self._distrusted.discard(shard)
            self._write_state()

    def _set_manifest(self, files: tuple[FileEntry, ...]) -> SetManifest:
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
            partitions=tuple(entry_of(self._out.path, part.part_id) for part in self._plan.partitions),
        )

    def _shard_entry(self, shard: Shard) -> ShardEntry:
        known = self._known[shard.name]
        computed = self._shard_sha256.get(shard.name)
        if known.sha256 is not None or computed is not None:
            return known if computed is None else known._replace(sha256=computed, sha256_is_published=False)
        published = self._checkpoint.published_sha256(shard.name)
        return known if published is None else known._replace(sha256=f"sha256:{published}", sha256_is_published=True)
