"""Elements of a tensor that lies strided in memory: how far they reach, and how to copy them out in order.

Shapes and strides count elements; both are non-negative and of the same length.  A stride of 0 repeats an element
(torch's `expand`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    lend: Callable[[int, int], AbstractContextManager[memoryview]],
    item_bytes: int,
    shape: Sequence[int],
    stride: Sequence[int],
    block_bytes: int,
    read_bytes: int = 4 << 20,
) -> Iterator[memoryview]:
    """Yield the tensor's bytes in row-major order, in blocks of at most `block_bytes`, or of one element.

    `lend` lends bytes [start, stop), counted from the first byte of the first element; it is asked for at most
    `read_bytes`, or one element, at a time, and for nothing beyond the furthest element.  Each block is memory of its
    own.  Where a block's elements lie far apart, all bytes between them are read for it: elements in another order (a
    transposed matrix) are read once for each block.  Raises `ValueError` if fewer bytes are lent than asked for.
    """
    import numpy as np  # reading headers never comes here

    if 0 in shape:
        return
    dtype = np.dtype(_WORDS.get(item_bytes, f"V{item_bytes}"))
    most_count = max(1, read_bytes // item_bytes)

    def fill(out: NDArray[Any], first: int, steps: Sequence[int]) -> None:
        """Fill `out` with the elements from `first` on; its dimensions have falling `steps`."""
        count = reach_count(out.shape, steps)
        if count <= most_count:
            with lend(first * item_bytes, (first + count) * item_bytes) as data:
                if len(data) != count * item_bytes:
                    raise ValueError("too few bytes")
                out[...] = np.ndarray(out.shape, dtype, data, strides=[step * item_bytes for step in steps])
            return
        row_count = reach_count(out.shape[1:], steps[1:])
        rows = 1 + (most_count - row_count) // steps[0] if row_count <= most_count else 1
        for row in range(0, len(out), rows):
            if rows == 1:
                fill(out[row, ...], first + row * steps[0], steps[1:])
            else:
                fill(out[row : row + rows], first + row * steps[0], steps)

    dimension, rows = _rows_per_block(shape, max(1, block_bytes // item_bytes))
    for outer in itertools.product(*map(range, shape[:dimension])):
        start = sum(index * step for index, step in zip(outer, stride, strict=False))
        for first in range(0, shape[dimension] if shape else 1, rows):
            part = (min(rows, shape[dimension] - first), *shape[dimension + 1 :]) if shape else ()
            block = np.empty(part, dtype)
            steps = stride[dimension:]
            # Furthest apart first: what is read at a time is then as close together as it can be.
            order = sorted(range(len(part)), key=lambda axis: -steps[axis])
            fill(block.transpose(order), start + (first * steps[0] if shape else 0), [steps[axis] for axis in order])
            yield memoryview(block.reshape(-1).view(np.uint8).data)


def _rows_per_block(shape: Sequence[int], most_count: int) -> tuple[int, int]:
    """Return a dimension, and how many of its rows make at most `most_count` elements (or one row of one element)."""
    for dimension in range(len(shape)):
        row_count = math.prod(shape[dimension + 1 :])
        if row_count <= most_count:
            return dimension, most_count // row_count
    return 0, 1
