"""A shard written in order is the bytes it was given, wherever its pieces begin, or it does not get its name."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoints import open_descriptors

from mmsplit.errors import IntegrityError
from mmsplit.sidecar.output_files import partial_path
from mmsplit.sidecar.set_manifest import KeptBytes, ShardEntry
from mmsplit.sidecar.shard_writer import ShardBlock, ShardWriter

_ROOM = 1 << 16
_DATA = random.Random(0).randbytes(5 * 4096 + 77_001)


def _entry(data: bytes, *, sha256: str | None = "right") -> ShardEntry:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}" if sha256 == "right" else sha256
    return ShardEntry("shard.safetensors", len(data), digest, KeptBytes.of(b""))


def _write(writer: ShardWriter, data: bytes, cuts: Sequence[int]) -> None:
    block = ShardBlock(_ROOM)
    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        block.place(start, stop - start)[:] = data[start:stop]
        writer.hash(block)
        writer.write(block)


_CUTS = {
    "on blocks": [4096, 8192, 8192 + _ROOM],
    "off blocks": [1, 4095, 4097, 9000, 9000 + _ROOM],
    "many in one block": [*range(10, 4090, 10), 60_000],
    "last in its own block": [50_000, len(_DATA) - 1],
    "an empty piece": [5000, 5000, 60_000],
}


@pytest.mark.parametrize("length", [len(_DATA), 4096 * 20])
@pytest.mark.parametrize("cuts", _CUTS.values(), ids=_CUTS)
def test_pieces_of_any_size(tmp_path: Path, cuts: Sequence[int], length: int) -> None:
    """What lies on the disk is the shard, under its name, and what an earlier run left there does no harm."""
    data = _DATA[:length]
    entry = _entry(data)
    partial_path(tmp_path / entry.name).write_bytes(b"an earlier run's" * 10_000)
    before = open_descriptors()
    writer = ShardWriter(tmp_path, entry)
    _write(writer, data, [cut for cut in cuts if cut < length])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {entry.name: data}
    assert open_descriptors() == before


def test_another_digest_keeps_the_name_away(tmp_path: Path) -> None:
    """The last block is not written, and the file stays what it is called until it is complete."""
    entry = _entry(_DATA, sha256="sha256:" + "0" * 64)
    writer = ShardWriter(tmp_path, entry)
    with pytest.raises(IntegrityError, match="merged shard is not the original"):
        _write(writer, _DATA, [50_000])
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == [partial_path(tmp_path / entry.name).name]


def test_without_a_digest_the_bytes_are_written_all_the_same(tmp_path: Path) -> None:
    """Where split recorded none there is none to compare."""
    entry = _entry(_DATA, sha256=None)
    _write(ShardWriter(tmp_path, entry), _DATA, [50_000])
    assert (tmp_path / entry.name).read_bytes() == _DATA


@pytest.mark.parametrize("start", [4000, 4200])
def test_a_gap_or_an_overlap_is_refused(tmp_path: Path, start: int) -> None:
    """Blocks follow each other: with no digest nothing else would find out."""
    writer = ShardWriter(tmp_path, _entry(_DATA, sha256=None))
    block = ShardBlock(_ROOM)
    block.place(0, 4096)[:] = _DATA[:4096]
    writer.write(block)
    block.place(start, 100)[:] = bytes(100)
    with pytest.raises(IntegrityError, match="do not follow each other"):
        writer.write(block)
    writer.close()
