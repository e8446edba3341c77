"""Tensors of any dtype as float32, the one kind of number that the JSON form has."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmsplit.dtypes import DTYPES, numpy_dtype
from mmsplit.errors import RequestError

#: Significant bits of a float32.
_EXACT_BELOW: Final = np.uint64(1 << 24)


class Float32(NamedTuple):
    """Numbers as float32, one dimension; `is_exact` says whether each is the number it was."""

    numbers: NDArray[np.float32]
    is_exact: bool


def require_float32(tensor: str, dtype: str) -> None:
    """Raise `RequestError` naming the tensor if its dtype has no float32 form."""
    if dtype == "C64" or numpy_dtype(dtype) is None:
        why = "of complex numbers" if dtype == "C64" else "packed below a byte" if dtype in DTYPES else "not known here"
        raise RequestError(
            f"tensor cannot be written as float32: its dtype is {why}",
            tensor=tensor,
            found=dtype,
            hint="Export to safetensors instead.",
        )


def as_float32(raw: bytes | memoryview | NDArray[Any], tensor: str, dtype: str) -> Float32:
    """Convert a tensor's raw bytes, or any run of whole elements of it.  Raises as `require_float32` does."""
    require_float32(tensor, dtype)
    values: NDArray[Any] = np.frombuffer(raw, np.uint8).view(numpy_dtype(dtype) or np.uint8)
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32)
    return Float32(numbers, _is_exact(values, numbers))


def _is_exact(values: NDArray[Any], numbers: NDArray[np.float32]) -> bool:
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "f" and size == 8:
        return bool(np.array_equal(numbers.astype(np.float64), values, equal_nan=True))
    if kind in "iu" and size >= 4:
        wrapped = values.astype(np.uint64)
        magnitude = np.where(values < 0, ~wrapped + np.uint64(1), wrapped)
        lowest_bit = np.maximum(magnitude & (~magnitude + np.uint64(1)), np.uint64(1))
        return bool((magnitude // lowest_bit < _EXACT_BELOW).all())
    return True
