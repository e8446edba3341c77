"""Every dtype becomes float32 or is refused by name; whether anything was lost is said."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.dtypes import DTYPES
from mmsplit.errors import RequestError
from mmsplit.exporting.float32 import as_float32


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in ("C64", "F4", "F6_E2M3", "F6_E3M2")])
def test_zero_and_one_are_exact(dtype: str) -> None:
    """Each dtype that a number has on its own converts; E8M0 has no zero."""
    known = DTYPES[dtype]
    name = "bool_" if dtype == "BOOL" else known.numpy_name or ""
    kind = getattr(np, name, None) or getattr(ml_dtypes, name)
    values = np.array([1, 1 if dtype == "F8_E8M0" else 0, 1]).astype(kind)
    found = as_float32(values.view(np.uint8), "w", dtype)
    assert found.is_exact
    assert found.numbers.dtype == np.float32
    assert found.numbers.tolist() == values.astype(np.float64).tolist()


@pytest.mark.parametrize(
    ("dtype", "why"), [("C64", "complex"), ("F4", "packed"), ("F6_E2M3", "packed"), ("Q4_K", "not known")]
)
def test_what_has_no_float32_form_is_named(dtype: str, why: str) -> None:
    """The error has tensor and dtype."""
    with pytest.raises(RequestError, match=why) as raised:
        as_float32(b"\0" * 8, "a.weight", dtype)
    assert (raised.value.tensor, raised.value.found) == ("a.weight", dtype)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_integers_are_exact_if_python_says_so(values: list[int]) -> None:
    """Python's own arithmetic on unlimited integers decides."""
    found = as_float32(np.array(values, np.int64).view(np.uint8), "w", "I64")
    assert found.is_exact == all(int(number) == value for number, value in zip(found.numbers, values, strict=True))


@pytest.mark.parametrize(
    ("dtype", "values", "exact"),
    [
        ("U64", [2**64 - 1], False),
        ("U64", [2**63, 0], True),
        ("I64", [-(2**63)], True),
        ("I32", [2**24 + 1], False),
        ("U32", [2**24], True),
        ("F64", [0.5, np.nan], True),
        ("F64", [0.1], False),
        ("F64", [1e300], False),
    ],
)
def test_edges(dtype: str, values: list[float], exact: bool) -> None:
    """The widest numbers, and those just beyond 24 bits."""
    array = np.array(values, (DTYPES[dtype].numpy_name or "").lower())
    assert as_float32(array.view(np.uint8), "w", dtype).is_exact == exact
