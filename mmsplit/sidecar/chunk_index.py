"""The chunk index: one fixed-size record per chunk, read and checked as one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from mmsplit.codec import KNOWN_CODECS, LAYOUTS, PLANES
from mmsplit.digests import CHUNK_DIGEST_BYTES
from mmsplit.sidecar.layout import (
    CHUNK_ALIGNMENT,
    CHUNK_BYTES,
    DATA_START,
    SLOT_ALIGNMENT,
    aligned,
    chunk_count_of,
)

#: `RECORD_BYTES`, little-endian, no padding.  `tensor` counts in the partition, `stored_offset` from the payload's
#: start.
CHUNK_RECORD: Final = np.dtype(
    [
        ("stored_offset", "<u8"),
        ("stored_bytes", "<u4"),
        ("raw_bytes", "<u4"),
        ("stored_xxh3", "<u8"),
        ("raw_xxh3", "<u8"),
        ("tensor", "<u4"),
        ("codec", "u1"),
        ("layout", "u1"),
        ("reserved", "<u2"),
        ("stored_blake3", f"V{CHUNK_DIGEST_BYTES}"),
    ]
)

ChunkIndex = NDArray[np.void]


def empty_index(chunk_count: int) -> ChunkIndex:
    """Return an index of zeroed records."""
    return np.zeros(chunk_count, CHUNK_RECORD)


def expected_raw(tensor_bytes: Sequence[int]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return, per chunk, the tensor it belongs to and its raw length, given each tensor's raw length."""
    sizes = np.asarray(tensor_bytes, np.uint64)
    counts = -(-sizes.astype(np.int64) // CHUNK_BYTES)
    tensor = np.repeat(np.arange(len(sizes), dtype=np.uint32), counts)
    raw = np.full(len(tensor), CHUNK_BYTES, np.uint32)
    last = np.cumsum(counts) - 1
    filled = counts > 0
    raw[last[filled]] = (sizes[filled].astype(np.int64) - (counts[filled] - 1) * CHUNK_BYTES).astype(np.uint32)
    return tensor, raw


def find_fault(index: ChunkIndex, tensor_bytes: Sequence[int], data_stop: int) -> tuple[int, str] | None:
    """Return the first record that cannot be true and why, or None.

    `data_stop` is where the last slot ends.  A sound index describes exactly the chunks of the tensors, in order,
    none larger than raw, none overlapping, and no more than padding between them: a hole would be bytes that no
    checksum covers.
    """
    chunk_count = sum(chunk_count_of(size) for size in tensor_bytes)
    if len(index) != chunk_count:
        return min(len(index), chunk_count), f"index has {len(index):,} records for {chunk_count:,} chunks"
    if chunk_count == 0:
        return None if data_stop == DATA_START else (0, "data without a chunk")
    tensor, raw = expected_raw(tensor_bytes)
    start = index["stored_offset"]
    stop = start + index["stored_bytes"]
    least = np.empty(chunk_count, np.uint64)
    least[0], least[1:] = DATA_START, stop[:-1]
    for bad, what in (
        (index["tensor"] != tensor, "belongs to another tensor"),
        (index["raw_bytes"] != raw, "has another raw length"),
        (index["stored_bytes"] > raw, "is stored larger than raw"),
        (index["stored_bytes"] == 0, "is stored in no bytes"),
        (start % CHUNK_ALIGNMENT != 0, "is not aligned"),
        ((start < least) | (start > data_stop), "overlaps its neighbour or leaves the payload"),
        (start - least >= SLOT_ALIGNMENT, "leaves a hole before it"),
        (stop > data_stop, "reaches past the payload's data"),
        (~np.isin(index["codec"], tuple(KNOWN_CODECS)), "has an unknown codec"),
        (index["layout"] >= len(LAYOUTS), "has an unknown word layout"),
        ((index["layout"] != 0) & (index["codec"] != PLANES), "has a word layout but is not in planes"),
        (index["reserved"] != 0, "has reserved bits set"),
    ):
        if bad.any():
            return int(np.argmax(bad)), what
    if aligned(int(stop[-1]), SLOT_ALIGNMENT) != data_stop:
        return chunk_count - 1, "does not end where the payload's data ends"
    return None


def tensor_checksum(raw_xxh3: NDArray[np.uint64]) -> str:
    """Return a tensor's checksum from those of its chunks, as 16 hex digits.

    One chunk: its xxh3-64.  Several: the xxh3-64 of their values as little-endian u64, in order, so that it can be
    computed in parallel.  None, the tensor being empty: the xxh3-64 of nothing.
    """
    if len(raw_xxh3) == 1:
        return f"{int(raw_xxh3[0]):016x}"
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(raw_xxh3, "<u8").tobytes())
