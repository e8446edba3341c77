"""Deletes the shards of a source, each when everything in it is proven to be in finished partitions.

The proof.  The partitions are synced, what memory has of them is dropped, and from what the disk gives back each shard
is put together again: its SHA-256 must be that of the shard's file.  Before the first shard goes, the state of the run
holds the kept bytes and the SHA-256 of all of them, synced; and each goes only while its file is still the one whose
bytes were read.  So at any moment every byte is in the source, or in the partitions and that state.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from mmsplit.checkpoint import Checkpoint, IoMode, ReaderPool, Shard, ShardHasher, ShardReaders
from mmsplit.errors import IntegrityError, NoSpaceError, SourceChangedError
from mmsplit.planning import Plan
from mmsplit.sidecar.consumed_directory import ConsumedDirectory, settle
from mmsplit.sidecar.disk_forecast import DiskForecast, forecast
from mmsplit.sidecar.manifest import manifest_name, payload_name
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, KeptBytes, SetManifest
from mmsplit.splitting.consumption import PartitionBytes, complete, shards_in_partitions, steps_of
from mmsplit.splitting.kept_journal import journal_of
from mmsplit.splitting.stored_shards import StoredShard, StoredShardHasher
from mmsplit.workers import JobStream, WorkerGroup

#: Told, before anything is written, what the run will do to the disk.
Announce = Callable[[DiskForecast], None]


class Consumer:
    """Consumes the shards of `checkpoint` into the partitions of `plan` in `out`.

    `gone` are the shards that are deleted, `deletable` those that were proven, so that the state says that they may be
    gone; `deleted_now` are those that this consumer deleted.  `disk` is what was foretold.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        directory: ConsumedDirectory,
        out: Path,
        kept: Mapping[str, KeptBytes],
        deletable: Collection[str],
        announce: Announce | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._directory = directory
        self._out = out
        self._kept = kept
        self._announce = announce
        self._stored = shards_in_partitions(checkpoint.shards, plan.partitions)
        self._proven: list[str] = []
        self._lock = threading.Lock()
        self.journal = journal_of(checkpoint, kept)
        #: How long the journal is as JSON, about.
        self.journal_bytes = len(json.dumps(self.journal))
        self.gone = {shard.name for shard in checkpoint.shards if not (directory.path / shard.name).exists()}
        self.deletable = set(deletable) & {shard.name for shard in checkpoint.shards}
        self.deleted_now: tuple[str, ...] = ()
        self.disk: DiskForecast | None = None

    @property
    def bytes_to_prove(self) -> int:
        """Raw bytes that will be read back."""
        return sum(item.shard.size_bytes - item.shard.kept_bytes for item in self._here())

    def is_only_copy(self, part_id: int) -> bool:
        """Whether a partition holds what was in a shard that is gone."""
        return any(part_id in item.part_ids for item in self._stored if item.shard.name in self.gone)

    def foretell(
        self, finished: Collection[int], todo: Sequence[PartitionBytes], base_bytes: int, free_bytes: int
    ) -> None:
        """Say what the run will do to the disk; raise `NoSpaceError` if it cannot be done with what is free."""
        freed = {item.shard.name: self._directory.freed_bytes(item.shard.name, self._out) for item in self._here()}
        self.disk = forecast(steps_of(self._stored, finished, todo, freed), base_bytes, free_bytes)
        if self._announce is not None:
            self._announce(self.disk)
        if free_bytes < self.disk.expected_bytes:
            raise NoSpaceError(
                "too little free space, although shards are deleted on the way",
                path=self._out,
                expected=f"{self.disk.expected_bytes:,} bytes free",
                found=free_bytes,
                hint="More and smaller partitions let shards go sooner (--num-parts); or free some space.",
            )

    def prove(
        self,
        finished: Collection[int],
        digests: Mapping[str, str],
        threads: int,
        add: Callable[[int], None],
        distrust: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Read back what `finished` partitions hold completely; from then on `delete_proven` deletes it.

        `digests` are the SHA-256 of the shards' files.  Raises `IntegrityError` if what the disk gives back is not the
        shard; `distrust` is called first if its partitions can be made again.
        """
        going = [item for item in complete(self._here(), finished) if item.shard.name not in self._proven]
        part_ids = sorted({part_id for item in going for part_id in item.part_ids})
        settle(self._out / name(part_id) for part_id in part_ids for name in (payload_name, manifest_name))
        with WorkerGroup() as group:

            def make_prover() -> Callable[[StoredShard], None]:
                hasher = StoredShardHasher(self._out, lambda name: self._kept[name].data(name), group.go_on)

                def check(item: StoredShard) -> None:
                    name = item.shard.name
                    expected, found = digests[name], hasher.sha256(item, add)
                    if found is None or f"sha256:{found}" != expected:
                        with self._lock:
                            if not any(self.is_only_copy(part_id) for part_id in item.part_ids):
                                distrust(name)
                        raise _not_proven(item, expected, found)

                return check

            group.start_many("prove", min(threads, max(1, len(going))), JobStream(iter(going)), make_prover)
        self._proven += [item.shard.name for item in going]
        self.deletable |= {item.shard.name for item in going}

    def delete_proven(self, readers: ShardReaders | None = None) -> None:
        """Delete what was proven; the state, or the set manifest, must say so by now.

        `readers` let go of it first: the space of an open file is not free.  Raises `SourceChangedError`, and deletes
        nothing, if a shard is not the file that was read.
        """
        names, self._proven = self._proven, []
        if isinstance(readers, ReaderPool):
            for name in names:
                readers.release(name)
        self._checkpoint.storage.require_unchanged(
            {shard.name: shard.identity for shard in self._checkpoint.shards if shard.name in names}
        )
        self._directory.require_deletable(names)
        self._directory.delete(names)
        self.gone.update(names)
        self.deleted_now += tuple(names)

    def consume_finished(self, manifest: SetManifest, io: IoMode, threads: int) -> None:
        """Delete every shard that is there and is what the finished set gives back.

        Raises `SourceChangedError` for one that is not what was split.
        """
        recorded = {shard.name: shard.sha256 for shard in manifest.shards if shard.sha256 is not None}
        for name, found in self.sha256_of_files([item.shard.name for item in self._here()], io, threads).items():
            if found != recorded.get(name):
                raise SourceChangedError(
                    "shard is not the one that was split: it is not deleted, nor is any other",
                    path=self._checkpoint.location_of(name),
                    expected=recorded.get(name),
                    found=found,
                )
        settle([self._out / SET_MANIFEST_NAME, *(self._out / entry.name for entry in manifest.files)])
        self.prove([entry.part_id for entry in manifest.partitions], recorded, threads, lambda _: None)

    def sha256_of_files(self, names: Sequence[str], io: IoMode, threads: int) -> dict[str, str]:
        """Hash shards that are there, from end to end."""
        found: dict[str, str] = {}
        with self._checkpoint.open_readers(io) as readers, WorkerGroup(readers.cancel) as group:

            def make_hasher() -> Callable[[str], None]:
                hasher = ShardHasher(self._checkpoint, readers, group.go_on)
                return lambda name: found.update({name: hasher.sha256(name)})

            group.start_many("hash", min(threads, max(1, len(names))), JobStream(iter(names)), make_hasher)
        return found

    def _here(self) -> list[StoredShard]:
        return [item for item in self._stored if item.shard.name not in self.gone]


def _not_proven(item: StoredShard, expected: str, found: str | None) -> IntegrityError:
    shard: Shard = item.shard
    return IntegrityError(
        "what the partitions give back is not this shard: it is not deleted",
        path=shard.location,
        expected=expected,
        found="copies of a tied weight that differ" if found is None else f"sha256:{found}",
        hint=f"Suspect the disk or the memory. Partitions {', '.join(map(str, item.part_ids))} hold it; run again with"
        " --resume, and see mmsplit verify.",
    )
