"""Strided elements: reach, contiguity and gathering, against numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.checkpoint.strided import is_contiguous, iter_row_major, reach_count


def lender(
    data: bytes | memoryview, most_bytes: int = 1 << 20
) -> Callable[[int, int], AbstractContextManager[memoryview]]:
    """Lend ranges of `data`, none longer than `most_bytes` and none outside; each is gone when it is given back."""

    @contextmanager
    def lend(start: int, stop: int) -> Iterator[memoryview]:
        assert 0 <= start < stop <= start + most_bytes
        with memoryview(data)[start:stop] as view:
            yield view

    return lend


geometry = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7)), max_size=4).map(
    lambda pairs: (tuple(size for size, _ in pairs), tuple(step for _, step in pairs))
)


@given(geometry, st.sampled_from([1, 2, 3, 4, 8, 16]), st.integers(1, 100), st.integers(1, 50))
def test_gathers_what_indexing_gives(
    geometry: tuple[tuple[int, ...], ...], item_bytes: int, block_bytes: int, read_bytes: int
) -> None:
    """Law: the blocks together are the elements in row-major order; none is longer than asked for, nor is a read."""
    shape, stride = geometry
    reach = reach_count(shape, stride)
    span = np.random.default_rng(0).bytes(reach * item_bytes)
    positions = [sum(i * s for i, s in zip(index, stride, strict=True)) for index in np.ndindex(shape)]
    assert reach == (max(positions) + 1 if positions else 0)
    expected = b"".join(span[p * item_bytes : (p + 1) * item_bytes] for p in positions)
    lend = lender(span, max(read_bytes, item_bytes))
    blocks = list(iter_row_major(lend, item_bytes, shape, stride, block_bytes, read_bytes))
    assert b"".join(blocks) == expected
    assert all(0 < len(block) <= max(block_bytes, item_bytes) for block in blocks)
    assert is_contiguous(shape, stride) == (positions == list(range(math.prod(shape))))


def test_blocks_are_memory_of_their_own() -> None:
    """A block outlives the view it was gathered from, which may be a map."""
    data = bytearray(range(12))
    blocks = list(iter_row_major(lender(memoryview(data)), 1, (3, 4), (4, 1), 4))
    data[:] = bytes(12)
    assert b"".join(blocks) == bytes(range(12))


def test_blocks_are_rows_where_rows_fit() -> None:
    """Few large blocks: two of five rows each, not one for each element."""
    lend = lender(bytes(10 * 7 * 4))
    lengths = [len(block) for block in iter_row_major(lend, 4, (10, 7), (1, 10), 5 * 7 * 4)]
    assert lengths == [140, 140]


def test_span_that_is_too_short_is_refused() -> None:
    """Nothing outside the span is ever read."""
    with pytest.raises(ValueError):
        list(iter_row_major(lender(bytes(15)), 4, (2, 2), (2, 1), 64))
    with pytest.raises(ValueError):
        list(iter_row_major(lender(bytes(16)), 4, (2, 2), (3, 1), 64))


def test_repeated_element_is_gathered_in_blocks() -> None:
    """An expanded tensor is far larger than its span, and no block is."""
    blocks = iter_row_major(lender(b"\1\2\3\4"), 4, (1 << 40,), (0,), 1 << 10)
    assert next(blocks) == b"\1\2\3\4" * 256
