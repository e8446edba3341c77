"""A whole payload again from the checkpoint, where it is missing or nothing tells any more where its chunks lie.

It is written beside the one that may be there, and takes its place only if its chunk index is the recorded one to the
last bit, and with it every chunk.  Interrupted, the next repair goes on from the slots that are there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from mmsplit.checkpoint import ShardRange, iter_with_read_ahead
from mmsplit.codec import CodecName
from mmsplit.errors import IntegrityError
from mmsplit.planning import iter_stored
from mmsplit.repairing.index_recovery import is_recorded_index
from mmsplit.repairing.planned_partition import planned_partition
from mmsplit.repairing.sources import CheckpointSource
from mmsplit.sidecar.chunk_index import tensor_checksum
from mmsplit.sidecar.framing import pack_header
from mmsplit.sidecar.layout import Slot, iter_slots
from mmsplit.sidecar.manifest import Manifest
from mmsplit.sidecar.output_files import PARTIAL_SUFFIX, output_errors
from mmsplit.sidecar.payload_writer import JOURNAL_SUFFIX, PayloadWriter
from mmsplit.sidecar.slot_encoder import SlotEncoder
from mmsplit.workers import JobStream, ProgressCallback, ProgressCounter, WorkerGroup

_EXTRA_THREADS = 1


def rebuild_payload(
    path: Path,
    json: bytes,
    manifest: Manifest,
    codec: CodecName,
    source: CheckpointSource,
    threads: int,
    progress: ProgressCallback | None,
) -> None:
    """Encode all tensors of the partition again and give the payload, and its JSON at `path`, their names.

    Raises `IntegrityError` if the source has other weights, or this mmsplit encodes them to other bytes than those on
    record; what was there before is then untouched.  Also branches of `CheckpointError`, `NetworkError`, `OutputError`.
    """
    for tensor in manifest.stored_tensors():
        source.require_range(tensor.shard, tensor.source_start, tensor.source_stop)
    planned = planned_partition(manifest)
    slots = list(iter_slots(iter_stored(planned)))
    header = pack_header(manifest.part_id, manifest.num_parts, manifest.plan_digest, manifest.source_digest)
    payload = path.with_suffix(".bin")
    writer = PayloadWriter(payload, header, manifest.chunk_count, len(slots))
    counter = ProgressCounter("repair", manifest.total_bytes, progress)
    writer.recover(slots, lambda slot: counter.add(slot.raw_bytes))
    try:
        writer.open()
        _write_slots(writer, slots[writer.recovered_slots :], manifest.part_id, codec, source, threads, counter)
        if is_recorded_index(manifest, writer.index.tobytes()):
            writer.finish(json, path)
            return
    finally:
        writer.close()
    with output_errors(payload):
        payload.with_name(payload.name + PARTIAL_SUFFIX).unlink(missing_ok=True)
        payload.with_name(payload.name + JOURNAL_SUFFIX).unlink(missing_ok=True)
    for tensor in manifest.stored_tensors():
        chunks = writer.index["raw_xxh3"][tensor.first_chunk : tensor.first_chunk + tensor.chunk_count]
        if tensor_checksum(chunks) != tensor.xxh3:
            raise IntegrityError("source bytes are not those that were split", path=source.location, tensor=tensor.name)
    raise IntegrityError("this version of mmsplit or zstd encodes to other bytes than those on record")


def _write_slots(
    writer: PayloadWriter,
    slots: list[Slot],
    part_id: int,
    codec: CodecName,
    source: CheckpointSource,
    threads: int,
    counter: ProgressCounter,
) -> None:
    with source.checkpoint.open_readers() as readers:
        permits = threading.Semaphore(threads)

        def cancel() -> None:
            readers.cancel()
            writer.cancel()

        with WorkerGroup(cancel) as group:

            def make_worker() -> Callable[[Slot], None]:
                encoder = SlotEncoder(readers, codec, permits)

                def work(slot: Slot) -> None:
                    encoded = encoder.encode(part_id, slot)
                    offset = writer.place(slot.number, encoded.stored_bytes)
                    writer.write(slot.number, slot.first_chunk, offset, encoded.block, encoded.records)
                    source.count(slot.raw_bytes)
                    counter.add(slot.raw_bytes)

                return work

            jobs = JobStream(iter_with_read_ahead(slots, readers, _ranges_of))
            group.start_many("repair", threads + _EXTRA_THREADS, jobs, make_worker)
    source.checkpoint.require_unchanged()


def _ranges_of(slot: Slot) -> Iterator[ShardRange]:
    for chunk in slot.chunks:
        start = chunk.tensor.start_offset + chunk.start
        yield ShardRange(chunk.tensor.shard, start, start + chunk.raw_bytes)
