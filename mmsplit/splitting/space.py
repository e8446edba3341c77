"""How much of the disk a split needs, before its first byte: refused if too much, foretold where shards are deleted.

The worst case is every chunk stored as it is.  Only where that would not fit, some slots are encoded on trial.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from mmsplit.checkpoint import Checkpoint, ShardReaders
from mmsplit.codec import CodecName
from mmsplit.sidecar.output_directory import OutputDirectory, free_bytes
from mmsplit.splitting.consumer import Consumer
from mmsplit.splitting.consumption import PartitionBytes
from mmsplit.splitting.parity_of_split import ParityOfSplit
from mmsplit.splitting.partition_run import PartitionRun
from mmsplit.splitting.slot_jobs import sample_ratio
from mmsplit.splitting.source_set import SourceSet

_MARGIN: Final = 1.03
#: In the JSON and in its copy together.
_MANIFEST_BYTES_PER_TENSOR: Final = 1024
#: What a file takes beyond its length, and a manifest beyond its tensors.
_SMALL_FILE_SLACK_BYTES: Final = 16 << 10
_STATE_BYTES_PER_SHARD: Final = 1024


class SpaceCheck(NamedTuple):
    """What the space that `runs` need in `out` depends on."""

    checkpoint: Checkpoint
    out: OutputDirectory
    codec: CodecName
    runs: Sequence[PartitionRun]
    readers: ShardReaders
    parity: ParityOfSplit

    def require_space(self, source_set: SourceSet | None) -> None:
        """Raise `NoSpaceError` if the set cannot fit; measure the ratio only if the worst case would not."""
        extra = sum(self._small_file_bytes()) + sum(_manifest_bytes(run) for run in self.runs)
        extra += self.parity.missing_bytes(self._finished())
        missing = self._missing()
        done = sum(run.writer.data_stop for run in missing)
        if source_set is not None:
            needed = sum(run.largest_bytes(source_set.stored_bytes(run.slots())) for run in missing)
            self.out.require_space(needed - done + extra, "the partition set")
            return
        worst = sum(run.largest_bytes() + self.parity.size_bytes(run.largest_bytes()) for run in missing)
        if self._free_bytes() >= worst + extra:
            return
        ratio = min(1.0, sample_ratio(self.runs, self.readers, self.codec) * _MARGIN)
        self.out.require_space(int(worst * ratio) - done + extra, "the partition set")

    def foretell(self, consumer: Consumer) -> None:
        """Let `consumer` say what the run will do to the disk, and refuse what cannot be done."""
        missing = self._missing()
        sampled = sample_ratio(missing, self.readers, self.codec, consumer.gone) if missing else 1.0
        ratio = min(1.0, sampled * _MARGIN)
        todo = []
        for run in missing:
            there = run.writer.data_stop if run.writer.recovered_slots else 0
            beside = run.journal_bytes + _manifest_bytes(run) + _SMALL_FILE_SLACK_BYTES - there
            worst, expected = (
                payload_bytes + beside + self.parity.size_bytes(payload_bytes)
                for payload_bytes in (run.largest_bytes(), int(run.largest_bytes() * ratio))
            )
            todo.append(PartitionBytes(run.partition.part_id, worst, expected))
        # The state is written beside the one before it; the set manifest says about as much.
        records = 3 * (consumer.journal_bytes + _STATE_BYTES_PER_SHARD * len(self.checkpoint.shards))
        small = sum(size + _SMALL_FILE_SLACK_BYTES for size in self._small_file_bytes())
        finished = self._finished()
        base = records + small + _SMALL_FILE_SLACK_BYTES + self.parity.missing_bytes(finished)
        consumer.foretell(finished, todo, base, self._free_bytes())

    def _missing(self) -> list[PartitionRun]:
        return [run for run in self.runs if not run.writer.is_finished]

    def _finished(self) -> set[int]:
        return {run.partition.part_id for run in self.runs if run.writer.is_finished}

    def _free_bytes(self) -> int:
        return free_bytes(self.out.path) + self.out.reclaimable_bytes

    def _small_file_bytes(self) -> list[int]:
        return [self.checkpoint.storage.file_bytes(name) or 0 for name in self.checkpoint.small_files]


def _manifest_bytes(run: PartitionRun) -> int:
    return sum(len(layer.tensors) for layer in run.partition.layers) * _MANIFEST_BYTES_PER_TENSOR
