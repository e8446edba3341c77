"""Who gets what: layers and a request -> `Plan`.  Pure; its JSON is the dry run."""

from mmsplit.planning.plan import Balance, Plan, PlannedLayer, PlannedPartition, iter_stored
from mmsplit.planning.planner import By, PlanRequest, TiedMode, checkpoint_layers, plan_checkpoint

__all__ = [
    "Balance",
    "By",
    "Plan",
    "PlanRequest",
    "PlannedLayer",
    "PlannedPartition",
    "TiedMode",
    "checkpoint_layers",
    "iter_stored",
    "plan_checkpoint",
]
