"""The chunk index is believed only if every record describes the chunk that must stand there."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mmsplit.sidecar.chunk_index import CHUNK_RECORD, ChunkIndex, empty_index, expected_raw, find_fault, tensor_checksum
from mmsplit.sidecar.layout import (
    CHUNK_ALIGNMENT,
    CHUNK_BYTES,
    DATA_START,
    RECORD_BYTES,
    SLOT_ALIGNMENT,
    aligned,
    chunk_count_of,
)

_sizes = st.lists(st.one_of(st.integers(0, 9000), st.integers(0, 3 * CHUNK_BYTES)), max_size=8)


def _sound(sizes: list[int], stored_of: int = 1) -> tuple[ChunkIndex, int]:
    """An index as a writer makes it, each chunk shrunk by `stored_of`, and where its data stops."""
    index = empty_index(sum(chunk_count_of(size) for size in sizes))
    position, row = DATA_START, 0
    for tensor, size in enumerate(sizes):
        for start in range(0, size, CHUNK_BYTES):
            raw = min(CHUNK_BYTES, size - start)
            stored = max(1, raw // stored_of)
            begin = aligned(position, CHUNK_ALIGNMENT)
            codec, word = (2, 4) if stored < raw else (0, 0)
            index[row] = (begin, stored, raw, 1, 2, tensor, codec, word, 0, bytes(32))
            position, row = begin + stored, row + 1
    return index, aligned(position, SLOT_ALIGNMENT)


def test_a_record_has_72_bytes() -> None:
    """The size that FORMAT.md gives, without padding."""
    assert CHUNK_RECORD.itemsize == RECORD_BYTES == 72


@given(_sizes, st.integers(1, 5))
@settings(deadline=None, database=None)
def test_a_sound_index_has_no_fault(sizes: list[int], stored_of: int) -> None:
    """Whatever the tensors are, empty ones among them."""
    index, data_stop = _sound(sizes, stored_of)
    assert find_fault(index, sizes, data_stop) is None
    tensor, raw = expected_raw(sizes)
    assert tensor.tolist() == index["tensor"].tolist()
    assert raw.tolist() == index["raw_bytes"].tolist()


_FIELD_FAULTS = [
    ("tensor", 0, "another tensor"),
    ("tensor", 2**32 - 1, "another tensor"),
    ("raw_bytes", 0, "another raw length"),
    ("raw_bytes", 2**32 - 1, "another raw length"),
    ("stored_bytes", 0, "in no bytes"),
    ("stored_bytes", 9001, "larger than raw"),
    ("stored_bytes", 2**32 - 1, "larger than raw"),
    ("stored_offset", 0, "overlaps"),
    ("stored_offset", DATA_START, "overlaps"),
    ("stored_offset", 2**64 - 64, "overlaps its neighbour or leaves"),
    ("stored_offset", 2**63, "overlaps its neighbour or leaves"),
    ("codec", 3, "unknown codec"),
    ("codec", 255, "unknown codec"),
    ("layout", 6, "unknown word layout"),
    ("layout", 255, "unknown word layout"),
    ("reserved", 1, "reserved bits"),
]


@pytest.mark.parametrize(("field", "value", "what"), _FIELD_FAULTS)
def test_a_wrong_field_is_found_and_located(field: str, value: int, what: str) -> None:
    """The record is named, and what is wrong with it."""
    sizes = [5000, 9000, 300]
    index, data_stop = _sound(sizes, 2)
    index[1][field] = value
    fault = find_fault(index, sizes, data_stop)
    assert fault is not None
    assert fault[0] in (1, 2)  # overlapping can be said of either
    assert what in fault[1]


def test_places_that_do_not_fit_are_found() -> None:
    """Not aligned, with a hole before it, beyond the data, data after the last: bytes without a checksum nowhere."""
    sizes = [5000, 9000, 300]
    index, data_stop = _sound(sizes, 2)
    for change, what in ((1, "is not aligned"), (2 * SLOT_ALIGNMENT, "leaves a hole before it")):
        moved = index.copy()
        moved["stored_offset"][1:] += np.uint64(change)
        assert find_fault(moved, sizes, data_stop + 4 * SLOT_ALIGNMENT) == (1, what)
    last = int(index["stored_offset"][-1])
    assert find_fault(index, sizes, last) == (2, "reaches past the payload's data")
    assert find_fault(index, sizes, last - 64) == (2, "overlaps its neighbour or leaves the payload")
    for extra in (1, SLOT_ALIGNMENT, 2**40):
        assert find_fault(index, sizes, data_stop + extra) == (2, "does not end where the payload's data ends")
    assert find_fault(empty_index(0), [0, 0], DATA_START) is None
    assert find_fault(empty_index(0), [], DATA_START + SLOT_ALIGNMENT) == (0, "data without a chunk")


@pytest.mark.parametrize(("sizes", "found"), [([5000], 3), ([5000, 9000, 300, 1], 3), ([2**63], 3), ([2**64 - 1], 3)])
def test_another_number_of_records_is_found(sizes: list[int], found: int) -> None:
    """An index of other tensors is not looked at further; a hostile length costs neither memory nor time."""
    index, data_stop = _sound([5000, 9000, 300])
    fault = find_fault(index, sizes, data_stop)
    assert fault is not None
    assert f"index has {found} records" in fault[1]


@given(_sizes, st.integers(0, 2**32), st.integers(1, 255))
@settings(deadline=None, database=None)
def test_any_changed_byte_of_a_place_is_found_or_harmless(sizes: list[int], where: int, change: int) -> None:
    """An index that passes describes chunks that lie apart from each other, inside the data, none larger than raw."""
    index, data_stop = _sound(sizes, 3)
    if len(index) == 0:
        return
    data = bytearray(index.tobytes())
    data[where % len(data)] ^= change
    changed = np.frombuffer(bytes(data), CHUNK_RECORD)
    if find_fault(changed, sizes, data_stop) is not None:
        return
    starts = [int(start) for start in changed["stored_offset"]]
    stops = [int(row["stored_offset"]) + int(row["stored_bytes"]) for row in changed]
    assert all(stop <= start for stop, start in zip([DATA_START, *stops], starts, strict=False))
    assert stops[-1] <= data_stop
    assert (changed["stored_bytes"] <= changed["raw_bytes"]).all()


def test_a_tensors_checksum_is_over_those_of_its_chunks() -> None:
    """None, one, several: the three cases of the format."""
    values = np.array([7, 2**64 - 1], np.uint64)
    assert tensor_checksum(values[:0]) == xxhash.xxh3_64_hexdigest(b"") == "2d06800538d394c2"
    assert tensor_checksum(values[:1]) == "0000000000000007"
    assert tensor_checksum(values) == xxhash.xxh3_64_hexdigest(b"\7" + bytes(7) + b"\xff" * 8)
    assert tensor_checksum(np.repeat(values, 2)[::2]) == tensor_checksum(values)
