"""`plan`: who would get what, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmsplit.checkpoint import Checkpoint
from mmsplit.planning import By, Plan, PlanRequest, TiedMode, plan_checkpoint
from mmsplit.remote.source import HubOptions, open_source


def plan(
    source: str | Path | Checkpoint,
    num_parts: int | None = None,
    *,
    by: By = "bytes",
    weights: Sequence[float | str] | None = None,
    boundaries: Sequence[str] | None = None,
    tied: TiedMode = "duplicate",
    hub: HubOptions | None = None,
    allow_unknown_dtypes: bool = False,
) -> Plan:
    """Plan the partitions of a checkpoint; no weight is read.

    `source` is a directory, a shard, a weights index, an open checkpoint, or a model of the Hub (`org/name`, reached as
    `hub` says).  The other arguments are those of `PlanRequest`.  Raises `CheckpointError`, `NetworkError` or
    `PlanError`.
    """
    source = open_source(source, hub, allow_unknown_dtypes=allow_unknown_dtypes)
    return plan_checkpoint(
        source, PlanRequest(num_parts=num_parts, by=by, weights=weights, boundaries=boundaries, tied=tied)
    )
