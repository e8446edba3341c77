"""`plan_for_nodes`: the plan that puts a model on given machines."""

from __future__ import annotations

from mmsplit.checkpoint import Checkpoint
from mmsplit.errors import PlanError
from mmsplit.planning.cuts import plan_checkpoint
from mmsplit.planning.memory_needs import ModelFacts
from mmsplit.planning.misfit import misfit_error
from mmsplit.planning.node_problem import NodeProblem, NodeRequest
from mmsplit.planning.placement import Placement
from mmsplit.planning.plan import Balance, NodePlacement, Plan, PlannedNode
from mmsplit.planning.planner import By, PlanRequest, option_name, plan_arranged
from mmsplit.planning.units import TiedMode, arrange_checkpoint


def plan_for_nodes(
    checkpoint: Checkpoint, request: NodeRequest, *, by: By = "bytes", tied: TiedMode = "duplicate"
) -> Plan:
    """Assign every layer to a node; nodes that get nothing have no partition.

    Partition k is for the k-th node that gets something.  `by` and `tied` are those of `PlanRequest`.  Raises
    `PlanError`, which says by how much the model does not fit, and what would.
    """
    arrangement = arrange_checkpoint(checkpoint, tied)
    units = (*arrangement.units, *(moved.unit for moved in arrangement.moved))
    layers = [unit.layer for unit in units if unit.layer.tensors]
    facts = ModelFacts(layers, checkpoint.tensors, checkpoint.config)
    problem = NodeProblem(arrangement, facts, request, by)
    any_order = request.nodes.order == "any"
    placed = problem.placement.solve_in_any_order() if any_order else problem.placement.solve()
    if placed is None:
        raise misfit_error(problem)
    used = [(start, stop) for start, stop in placed.ranges if start < stop]
    boundaries = [arrangement.units[start].layer.name for start, _ in used[1:]]
    plan = plan_arranged(checkpoint, arrangement, PlanRequest(boundaries=boundaries, by=by, tied=tied))
    placement = _node_placement(problem, placed)
    names = [node.node.name for node in placement.nodes if node.part_id is not None]
    return plan._replace(
        partitions=tuple(p._replace(node=name) for p, name in zip(plan.partitions, names, strict=True)),
        balance=_balance(placement),
        notes=(*plan.notes, *problem.needs.notes, *_remarks(request, placement)),
        placement=placement,
    )


def plan_for_nodes_or_parts(checkpoint: Checkpoint, request: PlanRequest, nodes: NodeRequest | None) -> Plan:
    """Plan on nodes if there are any, else as `request` says; the nodes say how many partitions, and how large.

    Raises `PlanError`, also where both say how to cut.
    """
    if nodes is None:
        return plan_checkpoint(checkpoint, request)
    for name in ("num_parts", "weights", "boundaries", "rule", "split_by"):
        if getattr(request, name) not in (None, "layer"):
            raise PlanError(
                f"--nodes and {option_name(name)} both say how to cut",
                hint="Leave one of them out: nodes get runs of layers; a node's share in the nodes file is its weight.",
            )
    return plan_for_nodes(checkpoint, nodes, by=request.by, tied=request.tied)


def boundaries_of(plan: Plan) -> tuple[str, ...]:
    """Return the first layer of each partition but the first: the `boundaries` that give this plan again."""
    return tuple(
        next(layer.name for layer in part.layers if not layer.moved) for part in plan.partitions if part.part_id > 0
    )


def _node_placement(problem: NodeProblem, placed: Placement) -> NodePlacement:
    """Say what the placement asks of each node, used or not, in pipeline order."""
    request, work = problem.request, problem.placement.work
    nodes = []
    part_id = 0
    for index, (start, stop) in zip(placed.order, placed.ranges, strict=True):
        used = start < stop
        strength = float(problem.placement.sites[index].strength)
        nodes.append(
            PlannedNode(
                request.nodes.nodes[index],
                part_id if used else None,
                problem.needs_of(start, stop),
                work.of(start, stop),
                strength,
            )
        )
        part_id += used
    bottleneck = max((node for node in nodes if node.part_id is not None), key=lambda n: n.work / n.strength)
    ideal = work.of(0, problem.placement.unit_count) / sum(site.strength for site in problem.placement.sites)
    return NodePlacement(
        objective=problem.objective,
        order=request.nodes.order,
        nodes=tuple(nodes),
        bottleneck=bottleneck.node.name,
        excess=float(placed.bottleneck / ideal - 1) if ideal else 0.0,
        memory=request.memory,
        kv_dtype=problem.needs.kv_dtype,
    )


def _balance(placement: NodePlacement) -> Balance:
    used = [node for node in placement.nodes if node.part_id is not None]
    return Balance(
        by=placement.objective,
        loads=tuple(node.work for node in used),
        weights=tuple(node.strength for node in used),
        bottleneck=next(k for k, node in enumerate(used) if node.node.name == placement.bottleneck),
        excess=placement.excess,
    )


def _remarks(request: NodeRequest, placement: NodePlacement) -> list[str]:
    remarks = []
    names = [node.node.name for node in placement.nodes]
    if names != [node.name for node in request.nodes.nodes]:
        remarks.append(f"the best order of the nodes is {', '.join(names)}")
    unused = [node.node.name for node in placement.nodes if node.part_id is None]
    if unused:
        remarks.append(
            f"nothing for {', '.join(unused)}: there are {len(names) - len(unused)} partitions, for the other nodes in"
            " this order"
        )
    return remarks
