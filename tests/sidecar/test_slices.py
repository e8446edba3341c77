"""The entry of a tensor from those of its slices."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mmsplit.checkpoint import SourcePlace, TensorRows
from mmsplit.sidecar.manifest import TensorEntry
from mmsplit.sidecar.slices import whole_of

ENDS = (0, 2, 3, 6)


def entry(start: int, stop: int, shape: tuple[int, int] = (6, 4)) -> TensorEntry:
    """Rows of a BF16 tensor that lies at byte 100 of `s` and at byte 8 of `r`; a row is 8 bytes."""
    also = (SourcePlace("u", "r", 8 + 8 * start, 8 + 8 * stop),)
    size = stop - start
    rows = TensorRows(start, stop, shape)
    place = ("s", 100 + 8 * start, 100 + 8 * stop)
    return TensorEntry("t", "BF16", (size, 4), 4 * size, 8 * size, "0" * 16, start, 1, *place, rows, also)


def test_slices_in_order_are_the_whole() -> None:
    """With its own shape, counts and places; no chunk and no checksum is the whole tensor's."""
    slices = [entry(start, stop) for start, stop in pairwise(ENDS)]
    also = (SourcePlace("u", "r", 8, 56),)
    assert whole_of(slices) == TensorEntry("t", "BF16", (6, 4), 24, 48, None, 0, 0, "s", 100, 148, None, also)


@pytest.mark.parametrize(
    "slices",
    [
        [entry(0, 2), entry(3, 6)],
        [entry(0, 2), entry(2, 5)],
        [entry(1, 6)],
        [entry(2, 6), entry(0, 2)],
        [entry(0, 2), entry(2, 6, (6, 5))],
        [entry(0, 6)._replace(rows=None)],
        [entry(0, 3), entry(3, 6)._replace(rows=None)],
    ],
)
def test_what_is_not_all_rows_in_order_is_no_whole(slices: list[TensorEntry]) -> None:
    assert whole_of(slices) is None
