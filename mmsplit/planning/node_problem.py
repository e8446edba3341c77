"""From a checkpoint, machines and a purpose to the problem of placing units on sites.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, get_args

from mmsplit.checkpoint import TensorInfo
from mmsplit.errors import PlanError
from mmsplit.layers import Layer
from mmsplit.planning.memory_needs import MemoryRequest, ModelFacts, ModelNeeds, Needs
from mmsplit.planning.nodes import Node, NodeList
from mmsplit.planning.placement import MAX_SETS, PlacementProblem, Site
from mmsplit.planning.planner import By, unit_load
from mmsplit.planning.units import Arrangement

#: What is made as small as possible: the fullest memory, the slowest stage, the largest part beyond a node's share.
Objective = Literal["memory", "speed", "share"]

_DEFAULT_MEMORY: Final = MemoryRequest()


@dataclass(frozen=True, kw_only=True)
class NodeRequest:
    """Machines, and what the model is to do on them.

    `objective` is "share" by default where the nodes have shares, else "memory".
    """

    nodes: NodeList
    objective: Objective | None = None
    memory: MemoryRequest = _DEFAULT_MEMORY


class NodeProblem:
    """The loads and sites of a request.  A stage's time and a node's share are counted in what `by` says.

    Raises `PlanError` for a request that no machine could make possible.
    """

    def __init__(self, arrangement: Arrangement, facts: ModelFacts, request: NodeRequest, by: By) -> None:
        self.request = request
        self.by = by
        self.arrangement = arrangement
        self.facts = facts
        self.objective = _objective(request)
        self.needs = ModelNeeds(facts, request.memory)
        layers = {layer.name: self.needs.of_layer(layer) for layer in facts.layers}

        def total(layer: Layer) -> int:
            return layers[layer.name].total_bytes

        self._layers = layers
        need = arrangement.load(total, lambda tensor: self.needs.of_copy(tensor).total_bytes)
        stored = unit_load(arrangement, facts.tensors, "bytes")
        work = need if self.objective == "memory" else unit_load(arrangement, facts.tensors, by)
        sites = [Site(n.usable_bytes, n.disk_bytes, _strength(n, self.objective)) for n in request.nodes.nodes]
        if not any(site.strength for site in sites):
            raise PlanError("no node may hold anything", expected="a share above 0", found="0 on every node")
        self.placement = PlacementProblem(sites, need, stored, work)
        if request.nodes.order == "any" and self.placement.count_sets() > MAX_SETS:
            raise PlanError(
                'order = "any" would have to try too many orders of these nodes',
                expected=f"at most {MAX_SETS:,} different sets of them, such as 13 nodes, or many of few kinds",
                found=f"{self.placement.count_sets():,}",
                hint='Give nodes of one kind the same numbers, or write them in their order with order = "file".',
            )

    def needs_of(self, start: int, stop: int) -> Needs:
        """Return what a node needs for units [start, stop), copies and moved layers included."""

        def of_field(field: int) -> int:
            def of_layer(layer: Layer) -> int:
                return self._layers[layer.name][field]

            def of_copy(tensor: TensorInfo) -> int:
                return self.needs.of_copy(tensor)[field]

            return self.arrangement.load(of_layer, of_copy).of(start, stop)

        return Needs(*map(of_field, range(len(Needs._fields))))

    def total_needs(self) -> Needs:
        """Return what all layers need together, each once."""
        return self.needs_of(0, len(self.arrangement.units))

    def fits(self) -> bool:
        """Whether all units fit, in the order given or, if that is free, in any."""
        placement = self.placement
        any_order = self.request.nodes.order == "any"
        fitting = placement.units_that_fit_in_any_order() if any_order else placement.units_that_fit()
        return fitting == placement.unit_count


def _objective(request: NodeRequest) -> Objective:
    nodes = request.nodes.nodes
    objective = request.objective
    if objective is None:
        objective = "share" if any(node.share is not None for node in nodes) else "memory"
    if objective not in get_args(Objective):
        raise PlanError("no such objective", expected=" or ".join(get_args(Objective)), found=repr(objective))
    if objective != "memory":
        _require_on_every_node(nodes, objective)
    return objective


def _require_on_every_node(nodes: Sequence[Node], field: Literal["speed", "share"]) -> None:
    for node in nodes:
        if (node.speed if field == "speed" else node.share) is None:
            raise PlanError(
                f"node {node.name!r}, field {field!r} is missing",
                expected=f"a {field} on every node for the objective {field}",
                found="none",
            )


def _strength(node: Node, objective: Objective) -> Fraction:
    if objective == "memory":
        return Fraction(node.usable_bytes)
    strength = node.speed if objective == "speed" else node.share
    return Fraction(0) if strength is None else strength
