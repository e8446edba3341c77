"""How a payload is cut for its parity: laws of the layout, and headers and tables that are sound or nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.codec.erasure import MOST_BLOCKS
from mmsplit.errors import FormatError, RequestError
from mmsplit.sidecar.parity_layout import (
    PAGE_BYTES,
    PAGE_ENTRIES,
    ParityHeader,
    ParityLayout,
    pack_parity_header,
    pack_table,
    parse_parity_header,
    parse_table_page,
    plan_parity,
)

SHA256 = "sha256:" + "1f" * 32
PERCENTS = st.integers(50, 5000).map(lambda hundredths: hundredths / 100)


@given(st.integers(1, 1 << 42), PERCENTS)
def test_every_block_is_in_one_stripe_and_there_is_enough_parity(payload_bytes: int, percent: float) -> None:
    """Columns take all blocks and none is empty; the numbers of a stripe's blocks fit; the share is what was asked."""
    layout = plan_parity(payload_bytes, percent)
    assert layout.data_count * layout.stripe_count >= layout.block_count
    assert (layout.data_count - 1) * layout.stripe_count < layout.block_count
    assert layout.data_count + layout.parity_count <= MOST_BLOCKS
    assert layout.parity_count * 100 >= layout.data_count * percent - 1e-6
    assert (layout.parity_count - 1) * 100 < layout.data_count * percent
    assert layout.block_bytes in (4096, 8192, 16384, 32768, 65536)
    assert layout.parity_start % PAGE_BYTES == layout.file_bytes % PAGE_BYTES == 0
    assert parse_parity_header(pack_parity_header(ParityHeader(7, SHA256, layout)), layout.file_bytes, "f") == (
        ParityHeader(7, SHA256, layout)
    )


@given(st.integers(1, 1 << 40), PERCENTS, st.integers(0, 1 << 40))
def test_one_loss_of_the_length_promised_takes_no_more_of_a_stripe_than_its_parity(
    payload_bytes: int, percent: float, start: int
) -> None:
    """Wherever it begins."""
    layout = plan_parity(payload_bytes, percent)
    start %= payload_bytes
    first = start // layout.block_bytes
    last = min(start + layout.longest_loss_bytes, payload_bytes) - 1
    blocks = last // layout.block_bytes - first + 1
    assert math.ceil(blocks / layout.stripe_count) <= layout.parity_count


@pytest.mark.parametrize("percent", [0, -1, 0.4999, 50.01, 2.005, 1e9, math.nan, math.inf, -math.inf])
def test_other_shares_are_refused(percent: float) -> None:
    """With what is possible."""
    with pytest.raises(RequestError, match="no such share"):
        plan_parity(1 << 20, percent)


def _page(layout: ParityLayout) -> bytes:
    return pack_parity_header(ParityHeader(3, SHA256, layout))


def test_any_flipped_bit_of_a_header_is_seen() -> None:
    """It has a checksum, and the rest of its page is zeros."""
    layout = plan_parity(123_456, 2)
    page = _page(layout)
    for position in [*range(100), 2000, PAGE_BYTES - 1]:
        other = bytearray(page)
        other[position] ^= 1
        assert parse_parity_header(bytes(other), layout.file_bytes, "f") is None
    assert parse_parity_header(page[:-1], layout.file_bytes, "f") is None


@pytest.mark.parametrize(
    "change",
    [
        {"payload_bytes": 0},
        {"payload_bytes": (1 << 64) - 1},
        {"payload_bytes": 123_456 + 5000},
        {"percent_hundredths": 49},
        {"percent_hundredths": 5001},
        {"block_bytes": 0},
        {"block_bytes": 1 << 31},
        {"block_bytes": 5000},
        {"data_count": 0},
        {"data_count": 65535},
        {"parity_count": 0},
        {"parity_count": 65535},
    ],
)
def test_a_header_that_lies_is_none(change: dict[str, int]) -> None:
    """Its checksum is right, but no parity file of that length has such numbers."""
    layout = plan_parity(123_456, 2)
    assert parse_parity_header(_page(layout._replace(**change)), layout.file_bytes, "f") is None


def test_a_version_not_known_is_an_error_of_its_own() -> None:
    """A newer mmsplit may read it."""
    layout = plan_parity(123_456, 2)
    fields = bytearray(_page(layout)[:72])
    fields[8] = 2
    page = bytes(fields) + xxhash.xxh3_64_digest(bytes(fields))[::-1]
    with pytest.raises(FormatError, match="version"):
        parse_parity_header(page.ljust(PAGE_BYTES, b"\0"), layout.file_bytes, "f")


@given(st.integers(1, 3 * PAGE_ENTRIES))
def test_tables_come_back_page_by_page(count: int) -> None:
    """And a page in the place of another one is none."""
    checksums = np.arange(1, count + 1, dtype=np.uint64)
    table = pack_table(checksums)
    pages = [table[start : start + PAGE_BYTES] for start in range(0, len(table), PAGE_BYTES)]
    found = [parse_table_page(page, number) for number, page in enumerate(pages)]
    assert np.concatenate(found)[:count].tolist() == checksums.tolist()
    assert parse_table_page(pages[0], 1) is None
    assert parse_table_page(pages[0][:-1], 0) is None
