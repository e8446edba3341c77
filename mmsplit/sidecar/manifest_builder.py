"""From a planned partition and its finished chunk index to its manifest.  Pure."""

from __future__ import annotations

from typing import NamedTuple

from mmsplit.digests import sha256_of
from mmsplit.planning import PlannedLayer, PlannedPartition
from mmsplit.sidecar.chunk_index import ChunkIndex, tensor_checksum
from mmsplit.sidecar.layout import SLOT_ALIGNMENT, aligned, chunk_count_of
from mmsplit.sidecar.manifest import LayerEntry, Manifest, TensorEntry


class Origin(NamedTuple):
    """What all partitions of a set have in common."""

    model_id: str
    revision: str | None
    num_parts: int
    plan_digest: str
    source_digest: str


def build_manifest(
    partition: PlannedPartition,
    origin: Origin,
    payload_file: str,
    index: ChunkIndex,
    data_start: int,
    data_stop: int,
) -> Manifest:
    """Return the manifest of a partition whose slots lie in payload bytes [`data_start`, `data_stop`)."""
    layers = []
    chunk, position, stored_total = 0, data_start, 0
    for layer in partition.layers:
        entry, chunk = _layer_entry(layer, index, chunk, position)
        position = entry.stop
        stored_total += entry.stored_bytes
        layers.append(entry)
    return Manifest(
        part_id=partition.part_id,
        num_parts=origin.num_parts,
        model_id=origin.model_id,
        revision=origin.revision,
        plan_digest=origin.plan_digest,
        source_digest=origin.source_digest,
        payload_file=payload_file,
        data_stop=data_stop,
        chunk_count=len(index),
        index_sha256=sha256_of(index.tobytes()),
        stored_bytes=stored_total,
        layers=tuple(layers),
    )


def _layer_entry(layer: PlannedLayer, index: ChunkIndex, first_chunk: int, start: int) -> tuple[LayerEntry, int]:
    tensors = []
    chunk = first_chunk
    for tensor in layer.tensors:
        count = chunk_count_of(tensor.size_bytes) if layer.stored else 0
        checksum = tensor_checksum(index["raw_xxh3"][chunk : chunk + count]) if layer.stored else None
        tensors.append(
            TensorEntry(
                tensor.name,
                tensor.dtype,
                tensor.shape,
                tensor.params,
                tensor.size_bytes,
                checksum,
                chunk,
                count,
                tensor.shard,
                tensor.start_offset,
                tensor.stop_offset,
                tensor.rows,
                tensor.also,
                tensor.hidden,
            )
        )
        chunk += count
    rows = index[first_chunk:chunk]
    stop, stored = start, 0
    if len(rows):
        stop = aligned(int(rows["stored_offset"][-1]) + int(rows["stored_bytes"][-1]), SLOT_ALIGNMENT)
        stored = int(rows["stored_bytes"].sum(dtype="u8"))
    entry = LayerEntry(
        layer.name,
        layer.layer_type,
        layer.stack,
        layer.block_index,
        start,
        stop,
        stored,
        tuple(tensors),
        layer.alias,
        layer.tied_to,
        layer.stored,
        layer.views,
    )
    return entry, chunk
