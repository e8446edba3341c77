"""One partition on its way: its writer, and its completion when the last slot is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from itertools import islice, takewhile
from pathlib import Path

from mmsplit.digests import sha256_of
from mmsplit.planning import PlannedPartition, iter_stored
from mmsplit.regular_files import read_regular
from mmsplit.sidecar.framing import pack_header
from mmsplit.sidecar.layout import DATA_START, Slot, iter_slots, largest_payload_bytes
from mmsplit.sidecar.manifest import format_manifest, manifest_name, parse_manifest, payload_name
from mmsplit.sidecar.manifest_builder import Origin, build_manifest
from mmsplit.sidecar.output_files import output_errors
from mmsplit.sidecar.payload_writer import PayloadWriter
from mmsplit.sidecar.set_manifest import PartitionEntry


class PartitionRun:
    """A planned partition that one run writes to `directory`."""

    def __init__(self, partition: PlannedPartition, origin: Origin, directory: Path, direct: bool) -> None:
        self.partition = partition
        self._origin = origin
        self.manifest_path = directory / manifest_name(partition.part_id)
        self.payload_path = directory / payload_name(partition.part_id)
        self.chunk_count = self.slot_count = 0
        for slot in self.slots():
            self.slot_count += 1
            self.chunk_count += len(slot.chunks)
        header = pack_header(partition.part_id, origin.num_parts, origin.plan_digest, origin.source_digest)
        self.writer = PayloadWriter(self.payload_path, header, self.chunk_count, self.slot_count, direct=direct)

    def slots(self) -> Iterator[Slot]:
        """Yield all slots in payload order."""
        return iter_slots(iter_stored(self.partition))

    def shards(self) -> set[str]:
        """Names of the shards that it has bytes of."""
        return {tensor.shard for _, tensor in iter_stored(self.partition)}

    def recover(
        self, distrusted: Collection[str], on_slot: Callable[[Slot], None], *, is_only_copy: bool = False
    ) -> int:
        """Take over what an earlier run left intact; return its raw bytes.

        A finished partition counts as a whole or not at all, an unfinished one by its leading slots.  Nothing is
        believed that holds bytes of the `distrusted` shards: those arrived other than they were sent.  With
        `is_only_copy`, of shards that are deleted, it is whole or an `IntegrityError`.
        """
        if is_only_copy or self.shards().isdisjoint(distrusted):
            if self.writer.adopt_finished(self.slots(), self.manifest_path, on_slot, is_only_copy=is_only_copy):
                return self.partition.total_bytes
        else:
            with output_errors(self.manifest_path):
                self.manifest_path.unlink(missing_ok=True)
                self.payload_path.unlink(missing_ok=True)
        trusted = takewhile(
            lambda slot: not any(chunk.tensor.shard in distrusted for chunk in slot.chunks), self.slots()
        )
        self.writer.recover(trusted, on_slot)
        return sum(slot.raw_bytes for slot in islice(self.slots(), self.writer.recovered_slots))

    def largest_bytes(self, data_bytes: int | None = None) -> int:
        """Upper bound of the payload's size; `data_bytes` is what its chunks take, where that is known."""
        raw_bytes = self.partition.total_bytes if data_bytes is None else data_bytes
        return largest_payload_bytes(raw_bytes, self.chunk_count, self.slot_count)

    @property
    def journal_bytes(self) -> int:
        """Upper bound of what lies beside the payload until it is complete."""
        return self.writer.index.nbytes + 8 * self.slot_count

    def finish(self) -> None:
        """Complete the payload and write the manifest."""
        writer = self.writer
        manifest = build_manifest(
            self.partition, self._origin, self.payload_path.name, writer.index, DATA_START, writer.data_stop
        )
        writer.finish(format_manifest(manifest), self.manifest_path)


def entry_of(directory: Path, part_id: int) -> PartitionEntry:
    """Return what the set manifest says of a finished partition."""
    manifest_path, payload_path = directory / manifest_name(part_id), directory / payload_name(part_id)
    with output_errors(manifest_path):
        data = read_regular(manifest_path)
        payload_bytes = payload_path.stat().st_size
    manifest = parse_manifest(data, str(manifest_path))
    return PartitionEntry(
        part_id=part_id,
        manifest_file=manifest_path.name,
        manifest_sha256=sha256_of(data),
        payload_file=payload_path.name,
        payload_bytes=payload_bytes,
        total_params=manifest.total_params,
        total_bytes=manifest.total_bytes,
        stored_bytes=manifest.stored_bytes,
    )
