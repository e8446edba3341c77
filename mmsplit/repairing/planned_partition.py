"""A partition as it was planned, from its manifest: its slots, and which bytes of the source they hold.  Pure."""

from __future__ import annotations

from mmsplit.checkpoint import TensorInfo
from mmsplit.planning import PlannedLayer, PlannedPartition
from mmsplit.sidecar.manifest import LayerEntry, Manifest, TensorEntry


def planned_partition(manifest: Manifest) -> PlannedPartition:
    """Return the partition that was planned when the manifest was written."""
    return PlannedPartition(manifest.part_id, tuple(_layer(layer) for layer in manifest.layers))


def _layer(layer: LayerEntry) -> PlannedLayer:
    return PlannedLayer(
        layer.name,
        layer.layer_type,
        layer.stack,
        layer.block_index,
        tuple(_tensor(tensor) for tensor in layer.tensors),
        layer.alias,
        layer.tied_to,
        layer.stored,
        views=layer.views,
    )


def _tensor(tensor: TensorEntry) -> TensorInfo:
    return TensorInfo(
        tensor.name,
        tensor.dtype,
        tensor.shape,
        tensor.shard,
        tensor.source_start,
        tensor.source_stop,
        tensor.params,
        rows=tensor.rows,
        also=tensor.also,
        hidden=tensor.hidden,
    )
