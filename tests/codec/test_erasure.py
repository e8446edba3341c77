"""The erasure code is the one that PARITY.md writes down, and gives back whatever was lost, up to what it promises."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.codec.erasure import MOST_BLOCKS, StripeCode, require_erasure_library
from mmsplit.errors import MissingExtraError

pytest.importorskip("pyeclib")

LENGTH = 32


def _multiply(left: int, right: int) -> int:
    """Multiply in GF(2^8) as PARITY.md says: shift, and take x^8 + x^4 + x^3 + x^2 + 1 off."""
    product = 0
    while right:
        product ^= left if right & 1 else 0
        left = left << 1 ^ (0x11D if left & 0x80 else 0)
        right >>= 1
    return product


INVERSE = {value: next(o for o in range(256) if _multiply(value, o) == 1) for value in range(1, 256)}


@pytest.mark.parametrize(("data_count", "parity_count"), [(1, 1), (2, 1), (3, 2), (25, 1), (200, 4), (170, 85)])
def test_parity_is_what_the_document_says(data_count: int, parity_count: int) -> None:
    """Parity block p is the sum of data block j times 1 / ((k + p) XOR j)."""
    data = np.random.default_rng(1).integers(0, 256, (data_count, LENGTH), np.uint8)
    parity = StripeCode(data_count, parity_count).encode(data.tobytes())
    assert len(parity) == parity_count
    for number in {0, parity_count - 1}:
        expected = 0
        for column in range(data_count):
            expected ^= _multiply(INVERSE[(data_count + number) ^ column], int(data[column, 5]))
        assert parity[number].shape == (LENGTH,)
        assert parity[number][5] == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_loss_of_as_many_blocks_as_there_is_parity_comes_back(data: st.DataObject) -> None:
    """Whichever data blocks are lost, and whichever of the parity is left to give them back."""
    data_count = data.draw(st.integers(1, 60))
    parity_count = data.draw(st.integers(1, min(40, MOST_BLOCKS - data_count)))
    lost = sorted(data.draw(st.sets(st.integers(0, data_count - 1), min_size=1, max_size=min(parity_count, 12))))
    used = data.draw(st.permutations(range(parity_count)))[: len(lost)]
    blocks = np.random.default_rng(data_count).integers(0, 256, (data_count, LENGTH), np.uint8)
    code = StripeCode(data_count, parity_count)
    stored = code.encode(blocks.tobytes())
    left = blocks.copy()
    left[lost] = 0
    there = code.encode(left.tobytes())
    differences = {number: stored[number] ^ there[number] for number in used}
    for wanted in lost:
        assert code.restore(wanted, lost, differences).tobytes() == blocks[wanted].tobytes()


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
    with pytest.raises(MissingExtraError, match=r"mmsplit\[parity\]"):
        require_erasure_library()
