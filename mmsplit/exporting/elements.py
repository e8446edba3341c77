"""The elements of a tensor in row-major order, wherever they lie in what is stored; memory does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final

from mmsplit.checkpoint.strided import iter_row_major
from mmsplit.dtypes import DTYPES
from mmsplit.exporting.tensor import ExportTensor

#: Room for elements that are gathered: what lies in another order is read once for so many bytes of it.
_BLOCK_BYTES: Final = 32 << 20


def iter_elements(
    tensor: ExportTensor, lend: Callable[[int, int], AbstractContextManager[memoryview]]
) -> Iterator[memoryview]:
    """Yield the bytes of a view in order, in blocks; `lend` lends bytes [start, stop) of the stored tensor.

    The dtype must be known and of whole bytes.
    """
    view = tensor.view
    assert view is not None
    begin = view.offset_bytes
    return iter_row_major(
        lambda start, stop: lend(begin + start, begin + stop),
        DTYPES[tensor.dtype].bits // 8,
        tensor.shape,
        view.stride,
        _BLOCK_BYTES,
    )
