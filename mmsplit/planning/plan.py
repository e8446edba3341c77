"""The plan: which partition holds which layer, and where every byte of the source goes.  Pure records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from mmsplit.checkpoint import ByteRange, Shard, TensorInfo, TensorView
from mmsplit.checkpoint.cover import first_byte_not_covered_once
from mmsplit.checkpoint.tensor import total_size
from mmsplit.errors import PlanError, RequestError
from mmsplit.planning.memory_needs import MemoryRequest, Needs
from mmsplit.planning.nodes import Node
from mmsplit.planning.rows import require_whole


class PlannedLayer(NamedTuple):
    """A layer and its tensors as one partition holds them.

    `tied_to` is set where the layer's one tensor is stored elsewhere under its own name and used here as `alias`:
    the partition of that id holds the original.  `stored` says whether this partition has bytes for the
    layer's tensors: false for a tied layer that only refers to the original.  `moved` layers do not lie where
    forward order would have them, but with the weight they are tied to ("colocate").  `views` are the names of the
    state dict that see one of these tensors, in a tied layer only its alias.
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
    views: tuple[TensorView, ...] = ()

    @property
    def total_params(self) -> int:
        """Number of elements this partition stores for the layer."""
        return sum([tensor.params for tensor in self.tensors]) if self.stored else 0

    @property
    def total_bytes(self) -> int:
        """Raw bytes this partition stores for the layer."""
        return total_size(self.tensors) if self.stored else 0

    def as_json(self) -> dict[str, object]:
        """Return the layer as `plan --json` and `inspect --json` show it."""
        record: dict[str, object] = {
            "name": self.name,
            "layer_type": self.layer_type,
            "tensors": [tensor.name for tensor in self.tensors],
            "total_params": self.total_params,
            "total_bytes": self.total_bytes,
        }
        rows = {t.name: [t.rows.start, t.rows.stop] for t in self.tensors if t.rows is not None}
        if rows:
            record["rows"] = rows
        if self.alias is not None:
            record |= {"alias": self.alias, "tied_to": self.tied_to, "stored": self.stored}
        return record


class PlannedPartition(NamedTuple):
    """What one partition holds, layers in forward order; `node` is the machine it is for, where machines were given.

    `label` says what it is for where it is not simply the next layers: `attention`, `experts 0-15`.
    """

    part_id: int
    layers: tuple[PlannedLayer, ...]
    node: str | None = None
    label: str | None = None

    def __repr__(self) -> str:
        return f"<PlannedPartition {self.part_id}: {len(self.layers)} layers, {self.total_bytes:,} bytes>"

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
    a perfect split (0.03 = 3 %).  A partition of weight 0 is not balanced against the others: it gets what it gets.
    """

    by: str
    loads: tuple[int, ...]
    weights: tuple[float, ...]
    bottleneck: int
    excess: float


class PlannedNode(NamedTuple):
    """A machine and what the plan asks of it.  `part_id` is None for one that gets nothing.

    `work` is what the objective balances, in bytes of need ("memory") or in units of `by`; `strength` is what it is
    divided by: usable bytes, speed or share.
    """

    node: Node
    part_id: int | None
    needs: Needs
    work: int
    strength: float

    @property
    def fill(self) -> float:
        """Share of the usable memory that is needed; above 1 it would not fit."""
        return self.needs.total_bytes / self.node.usable_bytes if self.node.usable_bytes else 0.0

    def as_json(self) -> dict[str, object]:
        """Return the machine as `plan --json` shows it."""
        node = self.node
        return {
            "name": node.name,
            "part_id": self.part_id,
            "memory_bytes": node.memory_bytes,
            "reserve_bytes": node.reserve_bytes,
            "usable_bytes": node.usable_bytes,
            "disk_bytes": node.disk_bytes,
            "speed": None if node.speed is None else float(node.speed),
            "share": None if node.share is None else float(node.share),
            "needs": self.needs.as_json(),
            "fill": self.fill,
            "work": self.work,
        }


class NodePlacement(NamedTuple):
    """How a plan lies on machines, in pipeline order.

    `bottleneck` is the name of the node with the largest work / strength, and `excess` how far that is above a
    perfect split over all nodes (0.03 = 3 %), copies of tied weights included.
    """

    objective: str
    order: str
    nodes: tuple[PlannedNode, ...]
    bottleneck: str
    excess: float
    memory: MemoryRequest
    kv_dtype: str

    def as_json(self) -> dict[str, object]:
        """Return the placement as `plan --json` shows it."""
        request = self.memory
        return {
            "objective": self.objective,
            "order": self.order,
            "bottleneck": self.bottleneck,
            "excess": self.excess,
            "context": request.context,
            "batch": request.batch,
            "kv_dtype": self.kv_dtype,
            "training": request.training,
            "lora_rank": request.lora_rank if request.training == "lora" else None,
            "nodes": [node.as_json() for node in self.nodes],
        }


class Plan(NamedTuple):
    """The frozen assignment of layers to partitions, with the request that led to it.

    `split_by` is "layer", "type", "expert" or "rule".
    """

    partitions: tuple[PlannedPartition, ...]
    balance: Balance
    tied: str
    notes: tuple[str, ...]
    placement: NodePlacement | None = None
    split_by: str = "layer"

    def __repr__(self) -> str:
        total = sum(part.total_bytes for part in self.partitions)
        return f"<Plan by {self.split_by}: {self.num_parts} partitions, {total:,} bytes>"

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
                    [t.name if t.rows is None else [t.name, t.rows.start, t.rows.stop] for t in layer.tensors],
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
        on_machines = {} if self.placement is None else {"placement": self.placement.as_json()}
        return {
            "num_parts": self.num_parts,
            "split_by": self.split_by,
            "partitions": [
                {
                    "part_id": part.part_id,
                    **({} if part.node is None else {"node": part.node}),
                    **({} if part.label is None else {"label": part.label}),
                    "layers": [layer.as_json() for layer in part.layers],
                    "total_params": part.total_params,
                    "total_bytes": part.total_bytes,
                }
                for part in self.partitions
            ],
            **on_machines,
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


def sorted_part_ids(only: Collection[int], num_parts: int) -> tuple[int, ...]:
    """Return which partitions are asked for, in order.  Raises `RequestError` for one that there is not."""
    part_ids = tuple(sorted(set(only)))
    wrong = [part_id for part_id in part_ids if type(part_id) is not int or not 0 <= part_id < num_parts]
    if wrong or not part_ids:
        raise RequestError(
            f"there is no partition {wrong[0]}" if wrong else "no partition is asked for",
            expected=f"0 to {num_parts - 1}",
            hint="Partitions are counted from 0.",
        )
    return part_ids


def require_every_byte_accounted_for(
    partitions: Sequence[PlannedPartition], shards: Sequence[Shard], tensors: Mapping[str, TensorInfo]
) -> None:
    """Hold the plan to its law: each byte of each shard is kept, or in one partition, or in several as a recorded tie.

    Raises `PlanError` on the first byte that is not.
    """
    planned: list[TensorInfo] = []
    for part in partitions:
        for layer in part.layers:
            if layer.alias is None:
                if layer.tensors and not layer.stored:
                    raise PlanError("tensor is stored nowhere", tensor=layer.tensors[0].name)
                planned += layer.tensors
    if len(planned) != len(tensors) or {tensor.name: tensor for tensor in planned} != tensors:
        _require_each_whole(planned, tensors)  # some are cut, or something is wrong
    ranges: dict[str, list[ByteRange]] = {shard.name: list(shard.kept) for shard in shards}
    for tensor in tensors.values():
        ranges[tensor.shard].append((tensor.start_offset, tensor.stop_offset))
        for place in tensor.also:
            ranges[place.shard].append((place.start_offset, place.stop_offset))
    for shard in shards:
        offset = first_byte_not_covered_once(ranges[shard.name], shard.size_bytes)
        if offset is not None:
            raise PlanError("byte of the source has no place in the plan, or two", path=shard.location, offset=offset)


def _require_each_whole(planned: Iterable[TensorInfo], tensors: Mapping[str, TensorInfo]) -> None:
    placed: dict[str, list[TensorInfo]] = {}
    for tensor in planned:
        placed.setdefault(tensor.name, []).append(tensor)
    for name, tensor in tensors.items():  # said here for tensors without bytes, too
        require_whole(tensor, placed.pop(name, []))
    for name in placed:
        raise PlanError("tensor is not of this checkpoint", tensor=name)
