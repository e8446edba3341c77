"""Deletes the payloads of a set, each when every shard that has bytes of it is merged, synced and read back.

Before the first one goes, all of them are hashed: a damaged set is merged by nobody who deletes.  What goes on after
an interruption is decided by what is there: a payload may be missing if its shards lie in the output with their
SHA-256.  The manifests go last, the set manifest last of all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmsplit.errors import IntegrityError, MissingPartitionError, NoSpaceError, RequestError
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.consumed_directory import ConsumedDirectory, settle
from mmsplit.sidecar.disk_forecast import DiskForecast, DiskStep, forecast
from mmsplit.sidecar.manifest import parse_manifest
from mmsplit.sidecar.output_directory import UNFINISHED_MERGE_NAME
from mmsplit.sidecar.output_files import output_errors, write_whole_file
from mmsplit.sidecar.parity_layout import parity_name
from mmsplit.sidecar.partition_check import find_partition_fault
from mmsplit.sidecar.set_manifest import SET_MANIFEST_NAME, PartitionEntry, SetManifest, ShardEntry
from mmsplit.workers import JobStream, WorkerGroup

_FORMAT = "mmsplit-unfinished-merge"
#: No path that a system takes is longer.
_LONGEST_PATH = 4096
#: What a file takes beyond its length.
_SLACK_BYTES = 8 << 10


class Batch(NamedTuple):
    """Shards that are written before the payloads of partitions `part_ids` are deleted."""

    shards: tuple[ShardEntry, ...]
    part_ids: tuple[int, ...]


class SetConsumer:
    """Consumes the set in `directory` into shards in `out`.  `gone` are the partitions whose payload is deleted."""

    def __init__(self, directory: ConsumedDirectory, manifest: SetManifest, out: Path) -> None:
        self._directory = directory
        self._manifest = manifest
        self._out = out
        self._needs = {
            entry.part_id: shards_of(directory.path, manifest, entry.part_id) for entry in manifest.partitions
        }
        self._proven: set[str] = set()
        self.gone = gone_partitions(directory.path, manifest)
        self.deleted_now: tuple[str, ...] = ()

    def require_consumable(self) -> None:
        """Raise for a set that cannot be deleted in pieces: shards without SHA-256, links, no permission."""
        for shard in self._manifest.shards:
            if shard.sha256 is None:
                raise RequestError(
                    f"the SHA-256 of {shard.name} was not recorded: nothing is deleted for what cannot be proven",
                    path=self._directory.path,
                    hint="Leave --consume out.",
                )
        names = [name for entry in self._here() for name in self._names_of(entry)] + [SET_MANIFEST_NAME]
        manifests = (entry.manifest_file for entry in self._manifest.partitions)
        names += [name for name in manifests if (self._directory.path / name).exists()]
        self._directory.require_deletable(names)

    def batches(self, todo: Sequence[ShardEntry]) -> list[Batch]:
        """Return what is written before what is deleted, partition after partition."""
        batches = []
        missing = {shard.name: shard for shard in todo}
        waiting = [entry.part_id for entry in self._here()]
        while waiting:
            wanted = self._needs[waiting[0]]
            shards = tuple(shard for name, shard in missing.items() if name in wanted)
            missing = {name: shard for name, shard in missing.items() if name not in wanted}
            ready = tuple(part_id for part_id in waiting if self._needs[part_id].isdisjoint(missing))
            waiting = [part_id for part_id in waiting if part_id not in ready]
            batches.append(Batch(shards, ready))
        if missing:
            batches.append(Batch(tuple(missing.values()), ()))
        return batches

    def foretell(
        self, batches: Sequence[Batch], there_bytes: Mapping[str, int], base_bytes: int, free_bytes: int
    ) -> DiskForecast:
        """Return what the batches will do to the disk; `there_bytes` of a shard are on it already."""
        steps = []
        for batch in batches:
            written = sum(shard.size_bytes - there_bytes.get(shard.name, 0) + _SLACK_BYTES for shard in batch.shards)
            names = tuple(self._files_of(batch.part_ids))
            freed = sum(self._directory.freed_bytes(name, self._out) for name in names)
            steps.append(DiskStep(tuple(shard.name for shard in batch.shards), written, written, names, freed))
        return forecast(steps, base_bytes + 2 * _SLACK_BYTES, free_bytes)

    def require_space(self, disk: DiskForecast) -> None:
        """Raise `NoSpaceError` if what is free is not enough."""
        if disk.free_bytes < disk.extra_bytes:
            raise NoSpaceError(
                "too little free space, although partitions are deleted on the way",
                path=self._out,
                expected=f"{disk.extra_bytes:,} bytes free",
                found=disk.free_bytes,
                hint=f"Free {disk.extra_bytes - disk.free_bytes:,} bytes more, or choose another directory.",
            )

    def require_sound(self, threads: int, add: Callable[[int], None]) -> None:
        """Read and hash all of every partition that is there; raise the first fault, before anything is deleted."""
        root = self._directory.path
        settle(root / entry.payload_file for entry in self._here())
        for entry in self._here():
            fault = find_partition_fault(root, self._manifest, entry.part_id, threads, add)
            if fault is not None:
                raise fault

    def prove(self, part_ids: Collection[int], threads: int, sha256_of: Callable[[Path], str]) -> None:
        """Read back from the disk the shards that have bytes of these partitions; raise `IntegrityError` if one is not
        what was split.
        """
        wanted = set().union(*(self._needs[part_id] for part_id in part_ids))
        # A shard without a tensor is in no partition; the set manifest, which goes too, has its bytes.
        bare = {shard.name for shard in self._manifest.shards}.difference(*self._needs.values())
        wanted |= {name for name in bare if (self._out / name).exists()}
        wanted -= self._proven
        going = [shard for shard in self._manifest.shards if shard.name in wanted]
        settle(self._out / shard.name for shard in going)

        def check(shard: ShardEntry) -> None:
            found = sha256_of(self._out / shard.name)
            if found != shard.sha256:
                raise IntegrityError(
                    "the disk does not give back the merged shard as it was written; no partition of it is deleted",
                    path=self._out / shard.name,
                    expected=shard.sha256,
                    found=found,
                    hint="Suspect the disk. Remove this file, and run again with --resume.",
                )

        with WorkerGroup() as group:
            group.start_many("prove", min(threads, max(1, len(going))), JobStream(iter(going)), lambda: check)
        self._proven |= wanted

    def delete_payloads(self, part_ids: Collection[int]) -> None:
        """Delete what `prove` has proven; the files must be closed."""
        names = self._files_of(sorted(part_ids))
        mark = self._directory.path / UNFINISHED_MERGE_NAME
        if names and not mark.exists():
            state = {"format": _FORMAT, "output": str(self._out.absolute())}
            write_whole_file(mark, (json.dumps(state, indent=1) + "\n").encode())
        parity = (parity_name(part_id) for part_id in sorted(part_ids))
        names += [name for name in parity if (self._directory.path / name).exists()]
        self._directory.require_deletable(names)
        self._directory.delete(names)
        self.deleted_now += tuple(names)

    def finish(self, beside: Sequence[Path]) -> None:
        """Delete the manifests, when all is merged; `beside` are the other files that were written to the output."""
        settle(beside)
        manifests = [entry.manifest_file for entry in self._manifest.partitions]
        parity = [name for entry in self._manifest.partitions for name in self._parity_of(entry)]
        self._directory.delete(manifests + parity)
        # The set manifest last: with it, whoever was interrupted can still tell that all is there.
        self._directory.delete([UNFINISHED_MERGE_NAME])
        self._directory.delete([SET_MANIFEST_NAME])
        self.deleted_now += (*manifests, SET_MANIFEST_NAME)

    def _files_of(self, part_ids: Iterable[int]) -> list[str]:
        """Names of the payloads of partitions, each with that of its parity, which is of no use without it."""
        return [name for part_id in part_ids for name in self._names_of(self._manifest.partitions[part_id])]

    def _names_of(self, entry: PartitionEntry) -> list[str]:
        return [entry.payload_file, *self._parity_of(entry)]

    def _parity_of(self, entry: PartitionEntry) -> list[str]:
        name = parity_name(entry.part_id)
        return [name] if os.path.lexists(self._directory.path / name) else []

    def _here(self) -> Iterator[PartitionEntry]:
        return (entry for entry in self._manifest.partitions if entry.part_id not in self.gone)


def gone_partitions(root: Path, manifest: SetManifest) -> frozenset[int]:
    """Return the partitions of a set whose payload is not there."""
    return frozenset(entry.part_id for entry in manifest.partitions if not (root / entry.payload_file).exists())


def shards_of(root: Path, manifest: SetManifest, part_id: int) -> frozenset[str]:
    """Return the shards that have bytes of a partition; all of the set's if its manifest is gone."""
    path = root / manifest.partitions[part_id].manifest_file
    if not path.exists():
        return frozenset(shard.name for shard in manifest.shards)
    with output_errors(path):
        partition = parse_manifest(read_regular(path), str(path))
    tensors = (tensor for layer in partition.layers for tensor in layer.tensors)
    return frozenset(place.shard for tensor in tensors for place in tensor.places())


def require_merged(root: Path, manifest: SetManifest, gone: Collection[int], kept: Collection[str]) -> None:
    """Raise `MissingPartitionError` unless all that had bytes of the `gone` partitions is among the shards `kept`."""
    for part_id in sorted(gone):
        missing = sorted(shards_of(root, manifest, part_id) - set(kept))
        if missing:
            raise MissingPartitionError(
                f"partition {part_id} is not there, and {missing[0]} is not in the output",
                path=root / manifest.partitions[part_id].payload_file,
                hint="Copy the partition into the set" + _where_it_went(root),
            )


def _where_it_went(root: Path) -> str:
    try:
        output = json.loads(read_regular(root / UNFINISHED_MERGE_NAME).decode())["output"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "."
    if not isinstance(output, str) or len(output) > _LONGEST_PATH:
        return "."
    return f", or give the output to which it was merged: {output}."
