"""Slices: the same rows of every place of a tensor, and each row in one slice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.checkpoint import SourcePlace, TensorInfo, slice_rows
from mmsplit.errors import PlanError
from mmsplit.planning.rows import require_whole

WHOLE = TensorInfo("t", "BF16", (6, 4), "s", 100, 148, 24, also=(SourcePlace("u", "r", 8, 56),))


@given(ends=st.sets(st.integers(1, 5), max_size=5))
def test_slices_are_the_rows_of_every_place(ends: set[int]) -> None:
    """They follow each other, in the tensor's own place and in the others, and are the whole."""
    stops = [*sorted(ends), 6]
    slices = [slice_rows(WHOLE, start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
    require_whole(WHOLE, slices)
    position = 0
    for found in slices:
        (place,) = found.also
        assert (found.start_offset, place.start_offset) == (100 + position, 8 + position)
        assert place.stop_offset - place.start_offset == found.size_bytes == 2 * found.params
        assert place[:2] == ("u", "r")
        position += found.size_bytes
    assert position == WHOLE.size_bytes


UNSOUND = {
    "nowhere": ([], "in no partition"),
    "twice": ([WHOLE, WHOLE], "in two layers"),
    "not as it is": ([WHOLE._replace(dtype="F16")], "as the source has it"),
    "row missing at the start": ([slice_rows(WHOLE, 1, 6)], "row 0"),
    "row missing at the end": ([slice_rows(WHOLE, 0, 5)], "row 5"),
    "row missing between": ([slice_rows(WHOLE, 0, 2), slice_rows(WHOLE, 3, 6)], "row 2"),
    "row twice": ([slice_rows(WHOLE, 0, 4), slice_rows(WHOLE, 3, 6)], "row 4"),
    "all rows twice": ([slice_rows(WHOLE, 0, 6), slice_rows(WHOLE, 0, 6)], "row 6"),
    "whole and slice": ([WHOLE, slice_rows(WHOLE, 0, 6)], "row"),
    "slice of something else": ([slice_rows(WHOLE._replace(also=()), 0, 6)], "row 0"),
}


@pytest.mark.parametrize(("placed", "words"), UNSOUND.values(), ids=UNSOUND)
def test_every_row_has_one_place(placed: list[TensorInfo], words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        require_whole(WHOLE, placed)
    assert caught.value.tensor == "t"
