"""PARITY.md is enough: every byte of a parity file follows from the payload by code written from that page alone."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
import xxhash
from checkpoints import CAUSAL_CONFIG, Weight, write_checkpoint

from mmsplit.verbs.split import split

pytest.importorskip("pyeclib")


def _product(left: int, right: int) -> int:
    product = 0
    while right:
        product ^= left if right & 1 else 0
        left = left << 1 ^ (0x11D if left & 0x80 else 0)
        right >>= 1
    return product


INVERSE = [0, *(next(o for o in range(256) if _product(value, o) == 1) for value in range(1, 256))]


@pytest.mark.parametrize("percent", [2, 7.5, 50])
def test_the_file_is_what_the_document_says(tmp_path: Path, percent: float) -> None:
    """Header, its copy, both tables, and a byte of every parity block."""
    weights = [Weight(f"model.layers.{k}.mlp.noise.weight", "U8", (50_000,), 256) for k in range(22)]
    write_checkpoint(tmp_path / "model", [weights], files={"config.json": CAUSAL_CONFIG})
    split(tmp_path / "model", tmp_path / "set", 1, parity=percent)
    payload, data = ((tmp_path / "set" / f"partition_0.{end}").read_bytes() for end in ("bin", "parity"))

    magic, version, part_id, size, k, m, payload_bytes, share, reserved = struct.unpack_from("<8sIIIHHQII", data)
    assert (magic, version, part_id, reserved) == (b"MMSPPAR\0", 1, 0, 0)
    assert (payload_bytes, share) == (len(payload), percent * 100)
    assert data[40:72] == hashlib.sha256((tmp_path / "set" / "partition_0.json").read_bytes()).digest()
    assert data[72:80] == struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:72]))
    assert not any(data[80:4096])
    assert data[-4096:] == data[:4096]

    n = -(-len(payload) // size)
    stripes = -(-n // min(200, 255 * 10000 // (10000 + share)))
    columns = -(-n // stripes)
    assert (size, k, m) == (4096, columns, -(-columns * share // 10000))
    assert stripes > 1
    pages = -(-(n + m * stripes) // 511)
    start = 4096 * (1 + pages)
    assert len(data) == 2 * start + m * stripes * size

    blocks = [payload[at : at + size].ljust(size, b"\0") for at in range(0, len(payload), size)]
    parity = [data[at : at + size] for at in range(start, start + m * stripes * size, size)]
    checksums = [xxhash.xxh3_64_intdigest(block) for block in [*blocks, *parity]]
    table = b""
    for page in range(pages):
        entries = struct.pack("<511Q", *(checksums[511 * page : 511 * page + 511] + [0] * 511)[:511])
        table += entries + struct.pack("<Q", xxhash.xxh3_64_intdigest(entries, seed=page))
    assert data[4096:start] == table
    assert data[-4096 - len(table) : -4096] == table

    blocks += [bytes(size)] * (k * stripes - n)
    for p in range(m):
        for s in range(stripes):
            at = (p * 37 + s * 11) % size
            expected = 0
            for j in range(k):
                expected ^= _product(blocks[j * stripes + s][at], INVERSE[(k + p) ^ j])
            assert parity[p * stripes + s][at] == expected
