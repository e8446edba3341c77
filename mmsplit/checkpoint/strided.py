"""Elements of a tensor that lies strided in memory: how far they reach, and how to copy them out in order.

Shapes and strides count elements; both are non-negative and of the same length.  A stride of 0 repeats an element
(torch's `expand`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final

#: Numbers of this width are copied faster than opaque bytes; what they mean does not matter.
_WORDS: Final = {1: "u1", 2: "u2", 4: "u4", 8: "u8"}


def reach_count(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements from the first one of the tensor to its furthest, both included; 0 if empty."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements lie in row-major order without gaps; as torch has it, an empty tensor is contiguous."""
    if 0 in shape:
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def row_major_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the stride of a tensor whose elements lie in row-major order without gaps."""
    return tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


def iter_row_major(
    span: memoryview, item_bytes: int, shape: Sequence[int], stride: Sequence[int], block_bytes: int
) -> Iterator[memoryview]:
    """Yield the tensor's bytes in row-major order, in blocks of at most `block_bytes`, or of one element.

    `span` begins with the first element and holds at least `reach_count` of them; it is read while the iterator is
    used and stays the caller's.  Each block is memory of its own.  Raises `ValueError` if `span` is too short.
    """
    import numpy as np  # reading headers never comes here

    if 0 in shape:
        return
    dtype = np.dtype(_WORDS.get(item_bytes, f"V{item_bytes}"))
    # numpy's constructor checks that the strides stay within the span; as_strided would not.
    elements = np.ndarray(tuple(shape), dtype, span, strides=tuple(step * item_bytes for step in stride))
    dimension, rows = _rows_per_block(shape, max(1, block_bytes // item_bytes))
    for outer in itertools.product(*map(range, shape[:dimension])):
        part = elements[outer]
        for first in range(0, shape[dimension] if part.ndim else 1, rows):
            block = np.array(part[first : first + rows] if part.ndim else part, order="C")
            yield memoryview(block.reshape(-1).view(np.uint8).data)


def _rows_per_block(shape: Sequence[int], most_count: int) -> tuple[int, int]:
    """Return a dimension, and how many of its rows make at most `most_count` elements (or one row of one element)."""
    for dimension in range(len(shape)):
        row_count = math.prod(shape[dimension + 1 :])
        if row_count <= most_count:
            return dimension, most_count // row_count
    return 0, 1
