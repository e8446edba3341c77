"""An encoded chunk says itself where it ends; what is none says nothing, and costs nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mmsplit.codec import LAYOUTS, ChunkEncoder, layout_for, planes_end, zstd_end


def _compressible(size: int, seed: int) -> bytes:
    rng = np.random.Generator(np.random.PCG64(seed))
    data = rng.integers(0, 256, size, np.uint8)
    data[rng.integers(0, 2, size, np.uint8) == 0] = 0x3C
    return data.tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16", "F64", "U8", "I32"])
@pytest.mark.parametrize("size", [4096, 100_000 - 100_000 % 8, 1 << 20])
def test_the_end_of_planes(dtype: str, size: int) -> None:
    """Whatever follows the chunk."""
    raw = memoryview(_compressible(size, size))
    out = memoryview(bytearray(size))
    encoded = ChunkEncoder("planes", size).encode(raw, dtype, out)
    assert encoded.layout == layout_for(dtype).code
    data = memoryview(bytes(out[: encoded.stored_bytes]) + bytes(5000))
    assert planes_end(data, layout_for(dtype)) == encoded.stored_bytes
    assert planes_end(data[: encoded.stored_bytes - 1], layout_for(dtype)) is None


@pytest.mark.parametrize("size", [0, 1, 300, 70_000, 3_000_000])
@pytest.mark.parametrize("noise", ["some", "all", "none"])
@pytest.mark.parametrize("with_checksum", [False, True])
def test_the_end_of_a_frame(size: int, noise: str, with_checksum: bool) -> None:
    """Frames of compressed, raw and run-length blocks, with and without a checksum behind them."""
    data = {"some": _compressible(size, 1), "all": random.Random(1).randbytes(size), "none": bytes(size)}[noise]
    frame = zstandard.ZstdCompressor(level=1, write_checksum=with_checksum).compress(data)
    assert zstd_end(memoryview(frame + b"\x07" * 5000)) == len(frame)
    assert zstd_end(memoryview(frame)) == len(frame)
    assert zstd_end(memoryview(frame[:-1])) is None


@given(st.binary(max_size=300))
def test_any_bytes_are_survived(data: bytes) -> None:
    """An end within the data, or none."""
    view = memoryview(data)
    for layout in LAYOUTS:
        assert (planes_end(view, layout) or 0) <= len(data)
    for start in (b"", b"\x28\xb5\x2f\xfd"):
        assert (zstd_end(memoryview(start + data)) or 0) <= len(start + data)
