"""The one table of dtypes: the 22 names of safetensors, their width, and how the rest of mmsplit sees them.

Source of names and widths: `safetensors/src/tensor.rs` (0.8), enum `Dtype` and `Dtype::bitsize`.
Nothing outside this table may depend on a dtype's name; a name that is missing here is carried as opaque bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class DType(NamedTuple):
    """One dtype.  `bits` per element; `numpy_name` is None where an element is smaller than a byte.

    `numpy_name` is an attribute of numpy, or of ml_dtypes for those numpy lacks.
    `word_bytes` is the size of the little-endian number that the codec may take apart (C64 is two F32), and
    `exponent8` says that this number is sign(1) exponent(8) mantissa(rest), so that a byte boundary cuts the
    exponent.
    """

    name: str
    bits: int
    numpy_name: str | None
    word_bytes: int = 1
    exponent8: bool = False


DTYPES: Final[dict[str, DType]] = {
    dtype.name: dtype
    for dtype in (
        DType("BOOL", 8, "bool"),
        DType("F4", 4, None),
        DType("F6_E2M3", 6, None),
        DType("F6_E3M2", 6, None),
        DType("U8", 8, "uint8"),
        DType("I8", 8, "int8"),
        DType("F8_E5M2", 8, "float8_e5m2"),
        DType("F8_E4M3", 8, "float8_e4m3fn"),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        DType("I16", 16, "int16", 2),
        DType("U16", 16, "uint16", 2),
        DType("F16", 16, "float16", 2),
        DType("BF16", 16, "bfloat16", 2, True),
        DType("I32", 32, "int32", 4),
        DType("U32", 32, "uint32", 4),
        DType("F32", 32, "float32", 4, True),
        DType("C64", 64, "complex64", 4, True),
        DType("F64", 64, "float64", 8),
        DType("I64", 64, "int64", 8),
        DType("U64", 64, "uint64", 8),
    )
}


def numpy_dtype(name: str) -> np.dtype[Any] | None:
    """Return what numpy, or ml_dtypes, has for a dtype; None for one that is not known or smaller than a byte."""
    import numpy as np

    known = DTYPES.get(name)
    if known is None or known.numpy_name is None:
        return None
    if known.numpy_name == "bool":
        return np.dtype(np.bool_)  # numpy 1 has no `np.bool`
    if not hasattr(np, known.numpy_name):
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, known.numpy_name))
        return found
    return np.dtype(known.numpy_name)
