"""Where a tensor is in a plan: in one place, or cut along its first dimension, every row in one.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from mmsplit.checkpoint import TensorInfo, slice_rows
from mmsplit.errors import PlanError


def require_whole(tensor: TensorInfo, placed: Sequence[TensorInfo]) -> None:
    """Raise `PlanError` unless a tensor is `placed` once as it is, or in slices that have each of its rows once."""
    if not placed:
        raise PlanError("tensor is in no partition", tensor=tensor.name)
    if all(found.rows is None for found in placed):
        if len(placed) > 1:
            raise PlanError("tensor is in two layers without being tied", tensor=tensor.name)
        if placed[0] != tensor:
            raise PlanError("tensor is in no partition as the source has it", tensor=tensor.name)
        return
    row = 0
    for found in sorted(placed, key=lambda found: found.start_offset):
        rows = found.rows
        if rows is None or rows.start != row or found != slice_rows(tensor, rows.start, rows.stop):
            break
        row = rows.stop
    else:
        if row == tensor.shape[0]:
            return
    raise PlanError("row of a sliced tensor is in no partition, or in two", tensor=tensor.name, found=f"row {row:,}")
