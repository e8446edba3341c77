"""From a layer map and a request to a plan."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

from mmsplit.checkpoint import Checkpoint, TensorInfo
from mmsplit.errors import PlanError
from mmsplit.layers import Layer, build_layer_map
from mmsplit.planning.assignment import Load, TiedUnits, assign_contiguous
from mmsplit.planning.companions import companion_notes, find_companions, require_kept_together
from mmsplit.planning.plan import (
    Balance,
    Plan,
    PlannedLayer,
    PlannedPartition,
    require_every_byte_accounted_for,
)
from mmsplit.planning.ties import Tie, find_ties

#: What a partition's load is measured in.
By = Literal["bytes", "params", "layers"]
#: What becomes of a tied weight that a later partition needs: it gets a copy of its own, a reference to the
#: partition that has it, or the layers that use it move to that partition.
TiedMode = Literal["duplicate", "reference", "colocate"]
#: What a cut goes between: layers, what tensors do (attention, MLP …), or the trunk and routed experts of an MoE.
SplitBy = Literal["layer", "type", "expert"]
#: Which partition gets a tensor; None where the rule has no answer.
Rule: TypeAlias = Callable[[TensorInfo], int | None]
MAX_PARTS: Final = 65_535


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What the caller wants.  Exactly one of `num_parts`, `weights` and `boundaries` is needed; given together
    they must agree.

    `weights`: relative share per partition, in order.  `boundaries`: name of the first layer of each partition
    but the first.

    With `split_by` "type" the kinds say how many partitions there are, with a `rule` its answers do.  With "expert"
    partition 0 is the trunk, and `weights` are for the others.
    """

    num_parts: int | None = None
    by: By = "bytes"
    weights: Sequence[float | str | Fraction] | None = None
    boundaries: Sequence[str] | None = None
    tied: TiedMode = "duplicate"
    split_by: SplitBy = "layer"
    rule: Rule | None = None


class Unit(NamedTuple):
    """What a cut cannot divide: a layer, or one that uses a tied weight stored elsewhere."""

    layer: Layer
    tie: Tie | None


class Arrangement(NamedTuple):
    """What there is to assign: `units` in forward order, to be cut into runs; `moved` units go wherever unit
    `stored_unit` goes, which holds the tied weight.  `copied`: each other run that uses the weight holds it, too.
    """

    units: tuple[Unit, ...]
    moved: tuple[Unit, ...]
    stored_unit: int
    copied: TensorInfo | None
    notes: tuple[str, ...]

    def load(self, layer_cost: Callable[[Layer], int], copy_cost: Callable[[TensorInfo], int]) -> Load:
        """Return the cost of any run of units, given that of a layer and that of a copy of the tied weight."""

        def cost(unit: Unit) -> int:
            return 0 if unit.tie is not None else layer_cost(unit.layer)

        tied = []
        if self.copied is not None:
            uses = tuple(i for i, unit in enumerate(self.units) if unit.tie is not None)
            tied.append(TiedUnits(self.stored_unit, uses, copy_cost(self.copied)))
        follow = (self.stored_unit, sum(map(cost, self.moved))) if self.moved else None
        return Load([cost(unit) for unit in self.units], tied, follow)


def checkpoint_layers(checkpoint: Checkpoint) -> tuple[tuple[PlannedLayer, ...], tuple[str, ...]]:
    """Return all layers of a checkpoint in forward order, and all notes on them."""
    layer_map = build_layer_map(checkpoint.tensors, checkpoint.config)
    _, tie_notes = find_ties(layer_map, checkpoint.config)
    layers = tuple(_planned(layer, checkpoint.tensors) for layer in layer_map.layers)
    missing = companion_notes(find_companions(checkpoint.tensors), checkpoint.tensors, checkpoint.config)
    return layers, (*checkpoint.notes, *layer_map.notes, *tie_notes, *missing)


def plan_by_layer(checkpoint: Checkpoint, request: PlanRequest) -> Plan:
    """Assign every layer to a partition.  Raises `PlanError` that says what is possible."""
    return plan_arranged(checkpoint, arrange_checkpoint(checkpoint, request.tied), request)


def arrange_checkpoint(checkpoint: Checkpoint, tied: TiedMode) -> Arrangement:
    """Return what there is to assign.  Raises `PlanError` for an unknown way to treat tied weights."""
    if tied not in get_args(TiedMode):
        raise PlanError(
            f"no such way to treat tied weights: {tied!r}", hint=f"Possible are {', '.join(get_args(TiedMode))}."
        )
    layer_map = build_layer_map(checkpoint.tensors, checkpoint.config)
    ties, tie_notes = find_ties(layer_map, checkpoint.config)
    units, moved = _arrange(layer_map.layers, ties, tied)
    unit_of = {name: i for i, unit in enumerate(units) if unit.tie is None for name in unit.layer.tensors}
    used = next((unit.tie.tensor for unit in (*units, *moved) if unit.tie is not None), None)
    copies = tied == "duplicate" and any(unit.tie is not None for unit in units)
    return Arrangement(
        tuple(units),
        moved,
        stored_unit=0 if used is None else unit_of[used],
        copied=checkpoint.tensors[used] if used is not None and copies else None,
        notes=(*checkpoint.notes, *layer_map.notes, *tie_notes),
    )


def plan_arranged(checkpoint: Checkpoint, arrangement: Arrangement, request: PlanRequest) -> Plan:
    """Plan as `plan_by_layer` does; the arrangement is that of `request.tied`."""
    units, home_unit = arrangement.units, arrangement.stored_unit
    weights = _shares(request, len(units))
    load = unit_load(arrangement, checkpoint.tensors, request.by)
    if request.boundaries is not None:
        first = _first_of_boundaries(request.boundaries, [unit.layer.name for unit in units])
    else:
        first = assign_contiguous(load, weights, unit_load(arrangement, checkpoint.tensors, "bytes"))
    stops = (*first[1:], len(units))
    ranges = tuple(zip(first, stops, strict=True))
    home = next((k for k, (start, stop) in enumerate(ranges) if home_unit in range(start, stop)), 0)
    partitions = tuple(
        _partition(
            part_id,
            units[start:stop],
            arrangement.moved if part_id == home else (),
            checkpoint.tensors,
            request.tied,
            home,
        )
        for part_id, (start, stop) in enumerate(ranges)
    )
    require_every_byte_accounted_for(partitions, checkpoint.shards, checkpoint.tensors)
    groups = find_companions(checkpoint.tensors)
    require_kept_together(partitions, groups)
    loads = tuple(load.of(start, stop) for start, stop in ranges)
    missing = companion_notes(groups, checkpoint.tensors, checkpoint.config)
    notes = (*arrangement.notes, *missing, *tie_remarks(partitions))
    return Plan(partitions, balance_of(request.by, loads, weights), request.tied, notes)


def unit_load(arrangement: Arrangement, tensors: Mapping[str, TensorInfo], by: By) -> Load:
    """Return the load of any run of units in what `by` counts."""
    any_block = any(unit.layer.stack is not None for unit in arrangement.units)

    def size(tensor: TensorInfo) -> int:
        return tensor.params if by == "params" else tensor.size_bytes

    def cost(layer: Layer) -> int:
        if by == "layers":
            return int(layer.stack is not None or not any_block)
        return sum(size(tensors[name]) for name in layer.tensors)

    return arrangement.load(cost, (lambda _: 0) if by == "layers" else size)


def _arrange(layers: Sequence[Layer], ties: Sequence[Tie], tied: TiedMode) -> tuple[list[Unit], tuple[Unit, ...]]:
    """Put the tied layers where they run; with "colocate" set those aside that move to the stored weight."""
    units: list[Unit] = []
    for position, layer in enumerate([*layers, None]):
        units.extend(Unit(tie.layer, tie) for tie in ties if tie.position == position)
        if layer is not None:
            units.append(Unit(layer, None))
    if tied != "colocate" or not ties:
        return units, ()
    # The head moves to the embedding, and with it what runs after the last block: the hidden state goes there once.
    last_block = max((i for i, unit in enumerate(units) if unit.layer.stack is not None), default=-1)
    tail = {
        i
        for i, unit in enumerate(units)
        if i > last_block and last_block >= 0 and unit.layer.layer_type in ("norm", "head")
    }
    aside = {i for i, unit in enumerate(units) if unit.tie is not None} | tail
    return [unit for i, unit in enumerate(units) if i not in aside], tuple(units[i] for i in sorted(aside))


def _shares(request: PlanRequest, unit_count: int) -> tuple[Fraction, ...]:
    """Return the weight of each partition, or say why there is no such plan."""
    counts = {
        what: count
        for what, count in (
            ("num_parts", request.num_parts),
            ("weights", None if request.weights is None else len(request.weights)),
            ("boundaries", None if request.boundaries is None else len(request.boundaries) + 1),
        )
        if count is not None
    }
    if unit_count == 0:
        raise PlanError("checkpoint has no tensors, so there is nothing to plan")
    possible = f"This checkpoint can be cut into 1 to {min(unit_count, MAX_PARTS):,} partitions."
    if not counts:
        raise PlanError(
            "nobody said into how many partitions",
            hint=f"{possible} Give num_parts (--num-parts), weights or boundaries.",
        )
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{what} says {count}" for what, count in counts.items())
        raise PlanError(f"number of partitions is not clear: {said}", hint=possible)
    num_parts = next(iter(counts.values()))
    if type(num_parts) is not int or not 1 <= num_parts <= min(unit_count, MAX_PARTS):
        raise PlanError(
            f"{num_parts!r} is no possible number of partitions; there are {unit_count:,} layers, and each partition"
            " needs at least one",
            hint=possible,
        )
    if request.by not in get_args(By):
        raise PlanError(f"cannot balance by {request.by!r}", hint=f"Possible are {', '.join(get_args(By))}.")
    return tuple(parse_weight(weight) for weight in request.weights or [1] * num_parts)


def parse_weight(value: float | str | Fraction) -> Fraction:
    """Return a weight as an exact number.  Raises `PlanError` for what is none."""
    text = str(value)
    try:
        # A float first where there is an exponent: Fraction("1e999999999") would work that number out.
        plausible = "e" not in text.lower() or 1e-9 <= float(text) <= 1e9
        weight = Fraction(text) if plausible else Fraction(0)
    except (ValueError, ZeroDivisionError):
        weight = Fraction(0)
    if not 0 < weight <= 10**9 or weight.denominator > 10**9:
        raise PlanError(
            f"weight {text[:40]!r} is not a positive number up to 1,000,000,000", hint="Give weights such as 3,2,1."
        )
    return weight


def _first_of_boundaries(boundaries: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    first = [0]
    for boundary in boundaries:
        if boundary not in names:
            close = difflib.get_close_matches(boundary, names, 3, 0.5)
            raise PlanError(
                f"no layer is called {boundary[:200]!r}",
                hint=f"Close are {', '.join(close)}." if close else f"Layers run from {names[0]} to {names[-1]}.",
            )
        position = names.index(boundary)
        if position <= first[-1]:
            previous = names[first[-1]]
            raise PlanError(
                f"boundary {boundary!r} does not come after {previous!r}",
                hint="Give the first layer of each partition but the first, in forward order, each once.",
            )
        first.append(position)
    return tuple(first)


def _planned(layer: Layer, tensors: Mapping[str, TensorInfo]) -> PlannedLayer:
    infos = tuple(tensors[name] for name in layer.tensors)
    return PlannedLayer(layer.name, layer.layer_type, layer.stack, layer.block_index, infos)


def _partition(
    part_id: int,
    units: Sequence[Unit],
    moved: Sequence[Unit],
    tensors: Mapping[str, TensorInfo],
    tied: TiedMode,
    home: int,
) -> PlannedPartition:
    layers = []
    copied: set[str] = set()
    for unit in (*units, *moved):
        planned = _planned(unit.layer, tensors)
        if unit.tie is not None:
            # The first use in a partition brings the bytes, unless they are here or only referred to.
            copies = tied == "duplicate" and part_id != home and unit.tie.tensor not in copied
            copied.add(unit.tie.tensor)
            planned = planned._replace(alias=unit.tie.alias, tied_to=home, stored=copies)
        layers.append(planned._replace(moved=unit in moved))
    return PlannedPartition(part_id, tuple(layers))


def tie_remarks(partitions: Sequence[PlannedPartition]) -> list[str]:
    """Say where tied weights went."""
    remarks = []
    for part in partitions:
        moved = [layer.name for layer in part.layers if layer.moved]
        if moved and len(partitions) > 1:
            remarks.append(f"{', '.join(moved)} moved to partition {part.part_id}, which has the tied weight")
        for layer in part.layers:
            if layer.alias is None:
                continue
            name = layer.tensors[0].name
            if layer.stored:
                remarks.append(
                    f"partition {part.part_id} gets its own copy of {name} ({layer.total_bytes:,} bytes), which"
                    f" serves there as {layer.alias}"
                )
            elif layer.tied_to != part.part_id:
                remarks.append(f"partition {part.part_id} needs {name} as {layer.alias} from partition {layer.tied_to}")
    return remarks


def balance_of(by: str, loads: Sequence[int], weights: Sequence[Fraction]) -> Balance:
    """Say how even these loads are, given the weight of each."""
    relative = [load / weight for load, weight in zip(loads, weights, strict=True)]
    bottleneck = relative.index(max(relative))
    ideal = sum(loads) / sum(weights)
    excess = float(relative[bottleneck] / ideal - 1) if ideal else 0.0
    return Balance(by, tuple(loads), tuple(float(weight) for weight in weights), bottleneck, excess)
