"""What the work may cost, in counts that do not depend on a clock: bytes moved, calls made, memory allocated."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import mmsplit
from mmsplit.checkpoint import FileReader
from mmsplit.codec import ChunkDecoder, ChunkEncoder
from mmsplit.sidecar.layout import CHUNK_BYTES, DATA_START
from mmsplit.sidecar.payload_file import PayloadFile

#: Two chunks and a bit in one tensor, a few small ones: 10 MB in all.
SHAPES = {"model.layers.0.big.weight": 2 * CHUNK_BYTES // 4 + 1000, "model.layers.1.small.weight": 300_000}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint without tied weights, so that every byte goes to one place."""
    directory = tmp_path / "model"
    directory.mkdir()
    rng = np.random.default_rng(0)
    save_file(
        {name: rng.standard_normal(size, np.float32) for name, size in SHAPES.items()}, directory / "model.safetensors"
    )
    return directory


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of bytes and calls through the one place that reads and the one that writes."""
    found: Counter[str] = Counter()
    borrow, read, write_block, write = FileReader.borrow, FileReader.read, PayloadFile.write_block, PayloadFile.write

    def counting_borrow(self: FileReader, start: int, stop: int, *rest: Any) -> Any:
        found["borrowed bytes"] += stop - start
        found["borrows"] += 1
        return borrow(self, start, stop, *rest)

    def counting_read(self: FileReader, start: int, stop: int) -> bytes:
        found["read bytes"] += stop - start
        return read(self, start, stop)

    def counting_write_block(self: PayloadFile, offset: int, block: memoryview, *rest: Any) -> None:
        found["block bytes"] += len(block)
        found["blocks"] += 1
        write_block(self, offset, block, *rest)

    def counting_write(self: PayloadFile, offset: int, data: bytes | memoryview) -> None:
        found["other written bytes"] += len(data)
        write(self, offset, data)

    monkeypatch.setattr(FileReader, "borrow", counting_borrow)
    monkeypatch.setattr(FileReader, "read", counting_read)
    monkeypatch.setattr(PayloadFile, "write_block", counting_write_block)
    monkeypatch.setattr(PayloadFile, "write", counting_write)
    return found


def test_plan_reads_headers_only(checkpoint: Path, counts: Counter[str]) -> None:
    """Planning reads length field and header of each shard once, and borrows nothing."""
    plan = mmsplit.plan(checkpoint, 2)
    header = sum(shard.kept_bytes for shard in mmsplit.open_checkpoint(checkpoint).shards)
    assert plan.num_parts == 2
    assert counts["read bytes"] == 2 * header  # once by plan, once by the line above
    assert counts["borrows"] == 0


def test_split_touches_each_byte_twice_and_writes_each_once(
    checkpoint: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    """Each source byte is borrowed once to be encoded and once to be hashed; each stored byte is written once."""
    result = mmsplit.split(checkpoint, tmp_path / "set", 2)
    (shard,) = mmsplit.open_checkpoint(checkpoint).shards
    assert counts["borrowed bytes"] == 2 * shard.size_bytes - shard.kept_bytes
    payload = sum(entry.payload_bytes for entry in result.manifest.partitions)
    assert counts["block bytes"] + counts["other written bytes"] == payload
    assert counts["blocks"] == 4  # three chunks of the big tensor, one slot for the small one
    assert counts["other written bytes"] < 0.01 * payload + 4 * DATA_START


def test_verify_reads_each_stored_byte_once(checkpoint: Path, tmp_path: Path, counts: Counter[str]) -> None:
    """Verification borrows the slots once, in few ranges, and reads header, index and manifest copy besides."""
    mmsplit.split(checkpoint, tmp_path / "set", 2)
    counts.clear()
    result = mmsplit.verify(tmp_path / "set")
    assert result.ok
    assert counts["borrowed bytes"] == result.checked_bytes
    assert counts["borrows"] <= 4


def test_loading_a_tensor_reads_that_tensor(checkpoint: Path, tmp_path: Path, counts: Counter[str]) -> None:
    """One tensor out of a partition costs its own stored bytes and not a byte of the others."""
    mmsplit.split(checkpoint, tmp_path / "set", 1)
    with mmsplit.open_partition(tmp_path / "set" / "partition_0.json") as partition:
        counts.clear()
        array = partition["model.layers.1.small.weight"]
        assert 0 < counts["borrowed bytes"] < array.nbytes
        assert counts["borrows"] == 1


def test_merge_reads_each_stored_byte_once(checkpoint: Path, tmp_path: Path, counts: Counter[str]) -> None:
    """Merging borrows each stored chunk once and writes each byte of the shard once."""
    result = mmsplit.split(checkpoint, tmp_path / "set", 2)
    counts.clear()
    merged = mmsplit.merge(tmp_path / "set", tmp_path / "merged")
    assert counts["borrowed bytes"] == result.manifest.stored_bytes
    assert counts["block bytes"] + counts["other written bytes"] == merged.total_bytes


def test_repartition_moves_each_stored_byte_once(checkpoint: Path, tmp_path: Path, counts: Counter[str]) -> None:
    """Each stored byte is written once and nothing is encoded; it is borrowed once, or twice to see if it is shared."""
    made = mmsplit.split(checkpoint, tmp_path / "set", 1)
    counts.clear()
    again = mmsplit.repartition(tmp_path / "set", tmp_path / "two", 2)
    stored = made.manifest.stored_bytes
    assert again.encoded_bytes == 0
    assert again.copied_bytes + again.shared_bytes == stored
    assert stored <= counts["borrowed bytes"] <= 2 * stored + 4 * DATA_START
    payload = sum(entry.payload_bytes for entry in again.partitions)
    assert counts["block bytes"] + counts["other written bytes"] == payload


def test_plan_calls_little_python_per_tensor(tmp_path: Path) -> None:
    """Opening and planning a quantised MoE takes a bounded number of Python calls for each tensor: there are 92,000."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.{what}"
        for layer in range(8)
        for expert in range(40)
        for projection in ("gate", "up", "down")
        for what in ("weight", "weight_scale_inv")
    ]
    save_file({name: np.zeros(4, np.float32) for name in names}, tmp_path / "model.safetensors")
    mmsplit.plan(tmp_path, 2)  # what is imported or compiled at first use
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        mmsplit.plan(tmp_path, 2)
    finally:
        sys.setprofile(None)
    assert calls <= 9 * len(names)


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_a_look_at_a_checkpoint_imports_no_numpy(command: str) -> None:
    """Commands that read headers only do not import what takes long and works on bytes."""
    script = (
        f"import sys, mmsplit.cli, mmsplit.cli.{command}_command\n"
        "print(*{'numpy', 'blake3', 'zstandard', 'torch', 'pyeclib', 'model_signing', 'email'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F8_E4M3"])
def test_codec_allocates_next_to_nothing_per_chunk(dtype: str) -> None:
    """Encoding and decoding a 4 MiB chunk allocate under 256 KiB: buffers are reused, nothing is copied whole."""
    raw = memoryview((np.random.default_rng(0).standard_normal(CHUNK_BYTES // 4, np.float32) * 0.02).tobytes())
    encoder, decoder = ChunkEncoder("planes", CHUNK_BYTES), ChunkDecoder()
    out, back = memoryview(bytearray(CHUNK_BYTES)), memoryview(bytearray(CHUNK_BYTES))
    encoded = encoder.encode(raw, dtype, out)
    decoder.decode(out[: encoded.stored_bytes], encoded, back)
    tracemalloc.start()
    try:
        encoder.encode(raw, dtype, out)
        decoder.decode(out[: encoded.stored_bytes], encoded, back)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert bytes(back) == bytes(raw)
    assert peak < 256 << 10
