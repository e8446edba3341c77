"""The plan: which partition holds which layer, and where every byte of the source goes.  Pure records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mmsplit.checkpoint import Shard, TensorInfo
from mmsplit.errors import PlanError


class PlannedLayer(NamedTuple):
    """A layer and its tensors as one partition holds them.

    `tied_to` is set where the layer's one tensor is stored elsewhere under its own name and used here as `alias`:
    the partition of that id holds the original.  `stored` says whether this partition has bytes for the
    layer's tensors: false for a tied layer that only refers to the original.  `moved` layers do not lie where
    forward order would have them, but with the weight they are tied to ("colocate").
    """

    name: str
    layer_type: str
    stack: str | None
    block_index: int | None
    tensors: tuple[TensorInfo, ...]
    alias: str | None = None
    tied_to: int | None = None
    stored: bool = True
    moved: bool = False

    @property
    def total_params(self) -> int:
        """Number of elements this partition stores for the layer."""
        return sum(tensor.params for tensor in self.tensors) if self.stored else 0

    @property
    def total_bytes(self) -> int:
        """Raw bytes this partition stores for the layer."""
        return sum(tensor.size_bytes for tensor in self.tensors) if self.stored else 0

    def as_json(self) -> dict[str, object]:
        """Return the layer as `plan --json` and `inspect --json` show it."""
        record: dict[str, object] = {
            "name": self.name,
            "layer_type": self.layer_type,
            "tensors": [tensor.name for tensor in self.tensors],
            "total_params": self.total_params,
            "total_bytes": self.total_bytes,
        }
        if self.alias is not None:
            record |= {"alias": self.alias, "tied_to": self.tied_to, "stored": self.stored}
        return record


class PlannedPartition(NamedTuple):
    """What one partition holds, layers in forward order."""

    part_id: int
    layers: tuple[PlannedLayer, ...]

    @property
    def total_params(self) -> int:
        """Number of elements stored."""
        return sum(layer.total_params for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Raw bytes stored."""
        return sum(layer.total_bytes for layer in self.layers)


class Balance(NamedTuple):
    """How even a plan is.  `load` per partition is in units of `by`; `excess` is how far the bottleneck is above
    a perfect split (0.03 = 3 %).
    """

    by: str
    loads: tuple[int, ...]
    weights: tuple[float, ...]
    bottleneck: int
    excess: float


class Plan(NamedTuple):
    """The frozen assignment of layers to partitions, with the request that led to it."""

    partitions: tuple[PlannedPartition, ...]
    balance: Balance
    tied: str
    notes: tuple[str, ...]

    @property
    def num_parts(self) -> int:
        """Number of partitions."""
        return len(self.partitions)

    @property
    def digest(self) -> str:
        """SHA-256 over who gets what, as what: two plans with the same digest give the same partitions."""
        who_gets_what = [
            [
                [
                    layer.name,
                    layer.layer_type,
                    layer.stack,
                    layer.block_index,
                    [tensor.name for tensor in layer.tensors],
                    layer.alias,
                    layer.tied_to,
                    layer.stored,
                ]
                for layer in part.layers
            ]
            for part in self.partitions
        ]
        return "sha256:" + hashlib.sha256(json.dumps(who_gets_what).encode()).hexdigest()

    def as_json(self) -> dict[str, object]:
        """Return the plan as `plan --json` shows it."""
        return {
            "num_parts": self.num_parts,
            "partitions": [
                {
                    "part_id": part.part_id,
                    "layers": [layer.as_json() for layer in part.layers],
                    "total_params": part.total_params,
                    "total_bytes": part.total_bytes,
                }
                for part in self.partitions
            ],
            "balance": self.balance._asdict(),
            "digest": self.digest,
            "notes": list(self.notes),
        }


def iter_stored(partition: PlannedPartition) -> Iterator[tuple[PlannedLayer, TensorInfo]]:
    """Yield what the partition stores, in payload order."""
    for layer in partition.layers:
        if layer.stored:
            for tensor in layer.tensors:
                yield layer, tensor


def require_every_byte_accounted_for(
    partitions: Sequence[PlannedPartition], shards: Sequence[Shard], tensors: Mapping[str, TensorInfo]
) -> None:
    """Hold the plan to its law: each byte of each shard is header, or in one partition, or in several as a
    recorded tie.  Raises `PlanError` on the first byte that is not.
    """
    owner: dict[str, int] = {}
    for part in partitions:
        for layer in part.layers:
            if layer.alias is not None:
                continue
            for tensor in layer.tensors:
                if tensor.name in owner:
                    raise PlanError("tensor is in two layers without being tied", tensor=tensor.name)
                if not layer.stored:
                    raise PlanError("tensor is stored nowhere", tensor=tensor.name)
                owner[tensor.name] = part.part_id
    for name in tensors:
        if name not in owner:  # said here for tensors without bytes, too
            raise PlanError("tensor is in no partition", tensor=name)
    ranges: dict[str, list[tuple[int, int]]] = {shard.name: [(0, shard.header_bytes)] for shard in shards}
    for tensor in tensors.values():
        ranges[tensor.shard].append((tensor.start_offset, tensor.stop_offset))
    for shard in shards:
        position = 0
        for start, stop in sorted(ranges[shard.name]):
            if start != position:
                break
            position = stop
        if position != shard.size_bytes:
            raise PlanError("byte of the source has no place in the plan", path=shard.location, offset=position)
