"""Tensors that a plan cuts along their first dimension: every row has one place.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from mmsplit.checkpoint import TensorInfo, slice_rows
from mmsplit.errors import PlanError


def require_all_rows(name: str, slices: Sequence[TensorInfo], whole: TensorInfo | None) -> None:
    """Raise `PlanError` unless these are slices of `whole` that have each of its rows once."""
    row = 0
    for found in sorted(slices, key=lambda tensor: tensor.start_offset):
        if (
            whole is None
            or found.rows is None
            or found.rows.start != row
            or found != slice_rows(whole, found.rows.start, found.rows.stop)
        ):
            break
        row = found.rows.stop
    if whole is None or row != whole.shape[0]:
        raise PlanError("row of a sliced tensor is in no partition, or in two", tensor=name, found=f"row {row:,}")
