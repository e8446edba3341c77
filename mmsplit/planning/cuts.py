"""From a checkpoint and a request to a plan, whichever way it is to be cut."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import get_args

from mmsplit.checkpoint import Checkpoint
from mmsplit.errors import PlanError
from mmsplit.layers import Layer
from mmsplit.planning.companions import checkpoint_companions, companion_notes, require_kept_together
from mmsplit.planning.expert_cut import cut_by_expert
from mmsplit.planning.expert_map import find_experts
from mmsplit.planning.plan import Balance, Plan, PlannedPartition, require_every_byte_accounted_for
from mmsplit.planning.planner import (
    MAX_PARTS,
    By,
    PlanRequest,
    SplitBy,
    balance_of,
    option_name,
    parse_weight,
    plan_by_layer,
    tie_remarks,
)
from mmsplit.planning.rule_cut import cut_by_rule
from mmsplit.planning.sublayers import Cut, lay_out
from mmsplit.planning.type_cut import cut_by_type
from mmsplit.planning.units import TiedMode, checkpoint_units


def plan_checkpoint(checkpoint: Checkpoint, request: PlanRequest) -> Plan:
    """Assign every tensor to a partition, as the request wants them cut.

    Raises `PlanError` that says what is possible, also where the plan would part a quantised weight from its scales.
    """
    if request.split_by == "layer" and request.rule is None:
        return plan_by_layer(checkpoint, request)
    _require_possible(request)
    units, unit_notes = checkpoint_units(checkpoint)
    layers = [unit.layer for unit in units if unit.layer.tensors]
    cut, weights, cut_notes = _cut(checkpoint, layers, request)
    partitions = tuple(lay_out(cut, units, checkpoint, request.tied))
    groups = checkpoint_companions(checkpoint)
    require_kept_together(partitions, groups)
    require_every_byte_accounted_for(partitions, checkpoint.shards, checkpoint.tensors)
    notes = (
        *unit_notes,
        *cut_notes,
        *companion_notes(groups, checkpoint.tensors, checkpoint.config),
        *tie_remarks(partitions),
    )
    split_by = request.split_by if request.rule is None else "rule"
    return Plan(partitions, _balance(request.by, partitions, weights), request.tied, notes, split_by=split_by)


def _require_possible(request: PlanRequest) -> None:
    """Raise `PlanError` for what this way to cut has no use for."""
    what = f"--split-by {request.split_by}" if request.rule is None else "--rule"
    for name, value, values in (
        ("split_by", request.split_by, get_args(SplitBy)),
        ("by", request.by, get_args(By)),
        ("tied", request.tied, get_args(TiedMode)),
    ):
        if value not in values:
            raise PlanError(f"{name} cannot be {value!r}", hint=f"Possible are {', '.join(values)}.")
    if request.rule is not None and request.split_by != "layer":
        raise PlanError("--rule and --split-by (split_by) both say how to cut", hint="Leave one of them out.")
    if request.boundaries is not None:
        raise PlanError(f"--boundaries and {what} both say how to cut", hint="Leave one of them out.")
    if request.weights is not None and request.split_by != "expert":
        raise PlanError(
            f"--weights have no meaning with {what}, which itself says who gets what", hint="Leave them out."
        )


def _cut(
    checkpoint: Checkpoint, layers: Sequence[Layer], request: PlanRequest
) -> tuple[Cut, tuple[Fraction, ...], tuple[str, ...]]:
    """Return the cut, the weight of each partition (0: it gets what it gets) and notes."""
    tensors = checkpoint.tensors
    if not layers:
        raise PlanError("checkpoint has no tensors, so there is nothing to plan", path=checkpoint.location)
    if request.split_by == "expert":
        experts, notes = find_experts(layers, tensors, checkpoint.config)
        most = max((found.expert_count for found in experts if found is not None), default=0)
        shares = _expert_shares(request, most)
        return cut_by_expert(layers, experts, tensors, shares, request.by), (Fraction(0), *shares), notes
    cut = cut_by_type(layers, tensors) if request.rule is None else cut_by_rule(layers, tensors, request.rule)
    count = len(cut.labels)
    if request.num_parts not in (None, count):
        made = (
            f"the rule makes {count}" if request.rule else f"there are {count} kinds: {', '.join(map(str, cut.labels))}"
        )
        raise PlanError(
            f"number of partitions is not clear: {option_name('num_parts')} says {request.num_parts}, {made}",
            hint="Leave --num-parts out.",
        )
    return cut, (Fraction(1),) * count, ()


def _expert_shares(request: PlanRequest, most: int) -> tuple[Fraction, ...]:
    """Return the weight of each partition of experts."""
    possible = f"Give --num-parts (num_parts): a trunk and 1 to {most} partitions of experts." if most else None
    weights = None if request.weights is None else tuple(parse_weight(weight) for weight in request.weights)
    if weights is None and request.num_parts is None:
        raise PlanError("into how many partitions is not said", hint=possible)
    count = len(weights or ()) + 1 if request.num_parts is None else request.num_parts
    if type(count) is not int or not 2 <= count <= MAX_PARTS:
        raise PlanError(f"{count!r} is no possible number of partitions: a trunk and experts are two", hint=possible)
    if weights is not None and len(weights) != count - 1:
        raise PlanError(
            "weights are for the partitions behind the trunk",
            expected=f"{count - 1} of them",
            found=len(weights),
            hint="The trunk gets what is no routed expert, whatever the weights.",
        )
    return weights or (Fraction(1),) * (count - 1)


def _balance(by: By, partitions: Sequence[PlannedPartition], weights: Sequence[Fraction]) -> Balance:
    """Say how even the partitions are that were to be balanced; the first is left out if its weight is 0."""
    loads = [_load(part, by) for part in partitions]
    free = sum(1 for weight in weights if not weight)
    balanced = balance_of(by, loads[free:], weights[free:])
    return Balance(by, tuple(loads), tuple(map(float, weights)), balanced.bottleneck + free, balanced.excess)


def _load(part: PlannedPartition, by: By) -> int:
    if by == "layers":
        return sum(1 for layer in part.layers if layer.stored and layer.stack is not None)
    return part.total_params if by == "params" else part.total_bytes
