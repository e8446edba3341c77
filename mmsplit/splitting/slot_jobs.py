"""The stream of slots: in which order they are made, what each needs of the source, and making one."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Final, NamedTuple

from mmsplit.checkpoint import ShardRange, ShardReaders
from mmsplit.codec import CodecName
from mmsplit.sidecar.chunk_copier import StoredChunks
from mmsplit.sidecar.layout import Slot
from mmsplit.sidecar.slot_encoder import SlotEncoder
from mmsplit.splitting.partition_run import PartitionRun
from mmsplit.workers import ProgressCounter

#: Slots encoded on trial when the free space is less than the worst case.
_SPACE_SAMPLES: Final = 24


class SlotJob(NamedTuple):
    """One slot of one partition."""

    run: PartitionRun
    slot: Slot

    @property
    def part_id(self) -> int:
        """Number of the partition."""
        return self.run.partition.part_id


def iter_jobs(runs: Sequence[PartitionRun]) -> Iterator[SlotJob]:
    """Yield what is missing, partition by partition; each is opened when its turn comes."""
    for run in runs:
        run.writer.open()
        if run.writer.is_complete:  # nothing to store, or killed between the last slot and the end
            run.finish()
            continue
        for slot in run.slots():
            if slot.number >= run.writer.recovered_slots:
                yield SlotJob(run, slot)


def ranges_of(job: SlotJob, stored: StoredChunks) -> Iterator[ShardRange]:
    """Yield the source ranges that a job borrows, in order; what it copies from an earlier partition needs none."""
    for chunk in job.slot.chunks:
        needed = stored.source_range(job.part_id, chunk)
        if needed is not None:
            yield needed


def make_slot(job: SlotJob, encoder: SlotEncoder, stored: StoredChunks, counter: ProgressCounter) -> None:
    """Encode a slot and write it to its place; whoever writes the last one completes the partition."""
    encoded = encoder.encode(job.part_id, job.slot)
    writer = job.run.writer
    offset = writer.place(job.slot.number, encoded.stored_bytes)
    with stored.twin_of(job.part_id, job.slot, encoded.block) as twin:
        is_last = writer.write(job.slot.number, job.slot.first_chunk, offset, encoded.block, encoded.records, twin)
    if is_last:
        job.run.finish()
    counter.add(job.slot.raw_bytes)


def sample_ratio(
    runs: Sequence[PartitionRun], readers: ShardReaders, codec: CodecName, gone: Collection[str] = ()
) -> float:
    """Encode slots spread over all partitions on trial; return stored by raw bytes.

    Slots of shards that are `gone`, copies of tied weights, are left out.
    """
    every = max(1, sum(run.slot_count for run in runs) // _SPACE_SAMPLES)
    encoder = SlotEncoder(readers, codec, threading.Semaphore(1))
    raw = stored = 0
    jobs = (SlotJob(run, slot) for run in runs for slot in run.slots())
    for number, job in enumerate(jobs):
        if number % every == 0 and not any(chunk.tensor.shard in gone for chunk in job.slot.chunks):
            raw += job.slot.raw_bytes
            stored += len(encoder.encode(job.part_id, job.slot).block)
    return stored / raw if raw else 1.0
