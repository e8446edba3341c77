"""Arrays from the bytes of tensors: of the true dtype where numpy or ml_dtypes has it, flat bytes otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmsplit.checkpoint import TensorView
from mmsplit.checkpoint.strided import reach_count
from mmsplit.dtypes import numpy_dtype
from mmsplit.errors import IntegrityError, RequestError
from mmsplit.sidecar.manifest import TensorEntry

Array: TypeAlias = NDArray[Any]


def writable_bytes(buffer: Any, size_bytes: int, tensor: str) -> NDArray[np.uint8]:
    """Return a caller's buffer as bytes, or say why it cannot take a tensor of that size."""
    # numpy does not export arrays of ml_dtypes as buffers, so arrays are taken as arrays.
    array = buffer if isinstance(buffer, np.ndarray) else np.asarray(memoryview(buffer))
    faults = [
        what
        for what, is_so in (
            (f"{array.nbytes:,} bytes", array.nbytes != size_bytes),
            ("read-only", not array.flags.writeable),
            ("not in one piece", not array.flags.c_contiguous),
        )
        if is_so
    ]
    if faults:
        raise RequestError(
            "buffer does not fit the tensor",
            tensor=tensor,
            expected=f"{size_bytes:,} writable bytes in one piece",
            found=", ".join(faults),
            hint="Give a bytearray, or an array of the tensor's dtype and shape.",
        )
    return array.reshape(-1).view(np.uint8)


def typed(data: NDArray[np.uint8], entry: TensorEntry, path: Path) -> Array:
    """Return a tensor's bytes as its dtype and shape; where numpy lacks the dtype, as they are.

    Raises `RequestError` for a shape that numpy cannot have.
    """
    dtype = numpy_dtype(entry.dtype)
    try:
        return data if dtype is None else data.view(dtype).reshape(entry.shape)
    except ValueError as error:
        raise _no_array(error, path, entry.name) from None


def _no_array(error: ValueError, path: Path, tensor: str) -> RequestError:
    """A tensor of 65 dimensions, or of 2**62 rows of no elements, is sound, but there is no such array."""
    return RequestError(f"numpy has no array of this shape: {error}", path=path, tensor=tensor)


def seen(base: Array, view: TensorView, path: Path) -> Array:
    """Return what a view of a PyTorch file sees of its tensor's memory; a dtype that numpy lacks gives flat bytes.

    Raises `IntegrityError` for a view that reaches beyond it.
    """
    dtype = numpy_dtype(view.dtype)
    count = reach_count(view.shape, view.stride)
    reach_bytes = view.offset_bytes + count * (dtype.itemsize if dtype else 0)
    # The manifest was held to that when it was read, but the tensor may be that of another layer, or partition.
    if reach_bytes > base.nbytes:
        raise IntegrityError(
            "view does not lie in its tensor",
            path=path,
            tensor=view.name,
            expected=f"at most {base.nbytes:,} bytes",
            found=reach_bytes,
        )
    data = base.reshape(-1).view(np.uint8)[view.offset_bytes :]
    if dtype is None:
        return data
    items = data[: count * dtype.itemsize]
    if view.offset_bytes % dtype.itemsize:
        items = items.copy()
    # The constructor checks that every element lies within; as_strided cannot describe all dtypes of ml_dtypes.
    strides = tuple(step * dtype.itemsize for step in view.stride)
    try:
        shown: Array = np.ndarray(view.shape, dtype, items, strides=strides)
    except ValueError as error:
        raise _no_array(error, path, view.name) from None
    if 0 in view.stride:
        shown.flags.writeable = False  # its elements are one
    return shown
