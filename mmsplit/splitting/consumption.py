"""Which shards a plan lets go when, and how much disk that needs.  Pure.

A shard may go when the partitions that hold its tensors are finished.  A copy of a tied weight does not count: it is
taken from the partition of its original (`RepeatedChunks`), so that an embedding whose copy is in the last partition
does not keep its shard until then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from mmsplit.checkpoint import Shard
from mmsplit.planning import PlannedPartition, iter_stored
from mmsplit.sidecar.disk_forecast import DiskStep
from mmsplit.splitting.stored_shards import StoredShard


class PartitionBytes(NamedTuple):
    """What a partition will take on the disk beyond what is there of it: in the worst case, and as expected."""

    part_id: int
    worst_bytes: int
    expected_bytes: int


def shards_in_partitions(shards: Sequence[Shard], partitions: Sequence[PlannedPartition]) -> list[StoredShard]:
    """Return for each shard the partitions that hold its tensors, copies of tied weights left out.

    `partitions` in the order in which they are written.
    """
    part_ids: dict[str, set[int]] = {shard.name: set() for shard in shards}
    seen: set[tuple[str, int, int, str]] = set()
    for partition in partitions:
        for _, tensor in iter_stored(partition):
            key = (tensor.shard, tensor.start_offset, tensor.stop_offset, tensor.dtype)
            if key in seen or not tensor.size_bytes:
                continue
            seen.add(key)
            for name in (tensor.shard, *(place.shard for place in tensor.also)):
                part_ids[name].add(partition.part_id)
    return [StoredShard(shard, tuple(sorted(part_ids[shard.name]))) for shard in shards]


def complete(stored: Sequence[StoredShard], finished: Collection[int]) -> list[StoredShard]:
    """Return the shards of which everything is in `finished` partitions."""
    return [item for item in stored if set(item.part_ids) <= set(finished)]


def steps_of(
    stored: Sequence[StoredShard],
    finished: Collection[int],
    todo: Sequence[PartitionBytes],
    freed_bytes: Mapping[str, int],
) -> list[DiskStep]:
    """Return what happens on the disk: first what `finished` partitions let go, then partition after partition.

    `freed_bytes` by shard, of those that are there; the others have been deleted before.
    """
    waiting = [item for item in stored if item.shard.name in freed_bytes]
    done = set(finished)
    steps = []
    for part in (PartitionBytes(-1, 0, 0), *todo) if finished else todo:
        done.add(part.part_id)
        going = complete(waiting, done)
        waiting = [item for item in waiting if item not in going]
        names = tuple(item.shard.name for item in going)
        written = () if part.part_id < 0 else (f"partition {part.part_id}",)
        freed = sum(freed_bytes[name] for name in names)
        if written or names:
            steps.append(DiskStep(written, part.worst_bytes, part.expected_bytes, names, freed))
    return steps
