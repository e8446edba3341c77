"""Who gets what: layers and a request -> `Plan`.  Pure; its JSON is the dry run."""

from mmsplit.planning.cuts import plan_checkpoint
from mmsplit.planning.lookalikes import notes_before_split, possible_ties
from mmsplit.planning.memory_needs import MemoryRequest
from mmsplit.planning.node_planner import boundaries_of, plan_for_nodes, plan_for_nodes_or_parts
from mmsplit.planning.node_problem import NodeRequest, Objective
from mmsplit.planning.nodes import NodeList, binary_size, parse_nodes, parse_reserve
from mmsplit.planning.plan import Balance, Plan, PlannedLayer, PlannedPartition, iter_stored, sorted_part_ids
from mmsplit.planning.planner import By, PlanRequest, Rule, SplitBy, checkpoint_layers
from mmsplit.planning.rule_cut import RuleList, parse_rules
from mmsplit.planning.training_state import TrainingMethod
from mmsplit.planning.units import TiedMode

__all__ = [
    "Balance",
    "By",
    "MemoryRequest",
    "NodeList",
    "NodeRequest",
    "Objective",
    "Plan",
    "PlanRequest",
    "PlannedLayer",
    "PlannedPartition",
    "Rule",
    "RuleList",
    "SplitBy",
    "TiedMode",
    "TrainingMethod",
    "binary_size",
    "boundaries_of",
    "checkpoint_layers",
    "iter_stored",
    "notes_before_split",
    "parse_nodes",
    "parse_reserve",
    "parse_rules",
    "plan_checkpoint",
    "plan_for_nodes",
    "plan_for_nodes_or_parts",
    "possible_ties",
    "sorted_part_ids",
]
