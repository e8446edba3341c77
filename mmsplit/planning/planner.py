"""From a layer map and a request to a plan."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, TypeAlias, get_args

from mmsplit.checkpoint import Checkpoint, TensorInfo
from mmsplit.checkpoint.tensor import total_size
from mmsplit.errors import PlanError
from mmsplit.layers import Layer
from mmsplit.planning.assignment import Load, assign_contiguous
from mmsplit.planning.companions import checkpoint_companions, companion_notes, require_kept_together
from mmsplit.planning.plan import (
    Balance,
    Plan,
    PlannedLayer,
    PlannedPartition,
    require_every_byte_accounted_for,
)
from mmsplit.planning.units import Arrangement, TiedMode, Unit, arrange_checkpoint, checkpoint_units

#: What a partition's load is measured in.
By = Literal["bytes", "params", "layers"]
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


def checkpoint_layers(checkpoint: Checkpoint) -> tuple[tuple[PlannedLayer, ...], tuple[str, ...]]:
    """Return all layers of a checkpoint in forward order, and all notes on them."""
    units, notes = checkpoint_units(checkpoint)
    missing = companion_notes(checkpoint_companions(checkpoint), checkpoint.tensors, checkpoint.config)
    return tuple(_planned(unit, checkpoint.tensors) for unit in units if unit.layer.tensors), (*notes, *missing)


def plan_by_layer(checkpoint: Checkpoint, request: PlanRequest) -> Plan:
    """Assign every layer to a partition.  Raises `PlanError` that says what is possible."""
    return plan_arranged(checkpoint, arrange_checkpoint(checkpoint, request.tied), request)


def plan_arranged(checkpoint: Checkpoint, arrangement: Arrangement, request: PlanRequest) -> Plan:
    """Plan as `plan_by_layer` does; the arrangement is that of `request.tied`."""
    units = arrangement.units
    if not units:
        raise PlanError("checkpoint has no tensors, so there is nothing to plan", path=checkpoint.location)
    weights = _shares(request, len(units))
    load = unit_load(arrangement, checkpoint.tensors, request.by)
    if request.boundaries is not None:
        first = _first_of_boundaries(request.boundaries, [unit.layer.name for unit in units])
    else:
        stored = load if request.by == "bytes" else unit_load(arrangement, checkpoint.tensors, "bytes")
        first = assign_contiguous(load, weights, stored)
    stops = (*first[1:], len(units))
    ranges = tuple(zip(first, stops, strict=True))
    partitions = _partitions(arrangement, ranges)
    require_every_byte_accounted_for(partitions, checkpoint.shards, checkpoint.tensors)
    groups = checkpoint_companions(checkpoint)
    require_kept_together(partitions, groups)
    loads = tuple(load.of(start, stop) for start, stop in ranges)
    missing = companion_notes(groups, checkpoint.tensors, checkpoint.config)
    notes = (*arrangement.notes, *missing, *tie_remarks(partitions))
    return Plan(partitions, balance_of(request.by, loads, weights), request.tied, notes)


def unit_load(arrangement: Arrangement, tensors: Mapping[str, TensorInfo], by: By) -> Load:
    """Return the load of any run of units in what `by` counts."""
    any_block = any(unit.layer.stack is not None for unit in arrangement.units)

    def total(tensors: Iterable[TensorInfo]) -> int:
        return sum([tensor.params for tensor in tensors]) if by == "params" else total_size(tensors)

    def cost(layer: Layer) -> int:
        if by == "layers":
            return int(layer.stack is not None or not any_block)
        return total(map(tensors.__getitem__, layer.tensors))

    return arrangement.load(cost, (lambda tensor: 0 if by == "layers" else total((tensor,))))


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
    possible = f"This checkpoint can be cut into 1 to {min(unit_count, MAX_PARTS):,} partitions."
    if not counts:
        raise PlanError(
            "into how many partitions is not said",
            hint=f"Give --num-parts (num_parts), --weights or --boundaries. {possible}",
        )
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{option_name(what)} says {count}" for what, count in counts.items())
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


def option_name(argument: str) -> str:
    """Return what an argument of the Python API is called on the command line, and itself if that differs."""
    option = f"--{argument.replace('_', '-')}"
    return option if argument.isalpha() else f"{option} ({argument})"


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


def _planned(unit: Unit, tensors: Mapping[str, TensorInfo]) -> PlannedLayer:
    layer = unit.layer
    infos = tuple(map(tensors.__getitem__, layer.tensors))
    return PlannedLayer(layer.name, layer.layer_type, layer.stack, layer.block_index, infos, views=unit.views)


def _partitions(arrangement: Arrangement, ranges: Sequence[tuple[int, int]]) -> tuple[PlannedPartition, ...]:
    """Fill each partition with its run of units and what moved there."""
    run_of = [part_id for part_id, (start, stop) in enumerate(ranges) for _ in range(start, stop)]
    homes = {tensor: run_of[unit] for tensor, unit in arrangement.stored_in.items()}
    return tuple(
        PlannedPartition(
            part_id,
            tuple(
                _layers_of(
                    [(unit, False) for unit in arrangement.units[start:stop]]
                    + [(moved.unit, True) for moved in arrangement.moved if run_of[moved.home] == part_id],
                    part_id,
                    homes,
                    arrangement,
                )
            ),
        )
        for part_id, (start, stop) in enumerate(ranges)
    )


def _layers_of(
    units: Sequence[tuple[Unit, bool]], part_id: int, homes: Mapping[str, int], arrangement: Arrangement
) -> Iterator[PlannedLayer]:
    """Yield the layers of a partition; units come with whether they moved there."""
    copied: set[str] = set()
    for unit, moved in units:
        if unit.layer.tensors:
            yield _planned(unit, arrangement.tensors)._replace(moved=moved)
        for tie in unit.uses:
            # The first use in a partition brings the bytes, unless they are here or only referred to.
            copies = arrangement.copies and part_id != homes[tie.tensor] and tie.tensor not in copied
            copied.add(tie.tensor)
            view = arrangement.views.get(tie.alias)
            yield _planned(Unit(tie.layer, views=() if view is None else (view,)), arrangement.tensors)._replace(
                alias=tie.alias, tied_to=homes[tie.tensor], stored=copies, moved=moved
            )


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
