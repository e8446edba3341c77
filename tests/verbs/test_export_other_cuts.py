"""Exports of other cuts: rows that several partitions share are one tensor again, from a set and from its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import tree, write_checkpoint
from test_other_cuts import CONFIG, EXPERTS, KINDS, PACKED, moe_weights

import mmsplit
from mmsplit.exporting.export_record import RECORD_NAME


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A mixture whose layers keep their experts in every way; packed ones in several chunks."""
    weights = moe_weights(["packed", *KINDS], large=True)
    return write_checkpoint(tmp_path / "model", [weights], files={"config.json": CONFIG})


def stored(root: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor."""
    checkpoint = mmsplit.open_checkpoint(root)
    files = {shard.name: (root / shard.name).read_bytes() for shard in checkpoint.shards}
    return {
        t.name: (t.dtype, t.shape, files[t.shard][t.start_offset : t.stop_offset]) for t in checkpoint.tensors.values()
    }


def files(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(root).items() if name != RECORD_NAME}


@pytest.mark.parametrize(
    "cut",
    [
        {"split_by": "expert", "num_parts": 4},
        {"split_by": "type"},
        {"rule": lambda name: 1 if "norm" in name else 0},
    ],
    ids=["expert", "type", "rule"],
)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 10**5])
def test_the_whole_model_is_whole(source: Path, tmp_path: Path, cut: dict[str, Any], max_shard_bytes: int) -> None:
    """Every tensor with its own name and shape, whichever partitions it came from."""
    mmsplit.split(source, tmp_path / "set", **cut)
    mmsplit.export(tmp_path / "set", tmp_path / "a", max_shard_bytes=max_shard_bytes)
    mmsplit.export(source, tmp_path / "b", **cut, max_shard_bytes=max_shard_bytes)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert stored(tmp_path / "a") == stored(source)


def test_one_partition_has_its_rows(source: Path, tmp_path: Path) -> None:
    """Under the tensor's name, and a note says so; some of the partitions that share a tensor are no tensor."""
    mmsplit.split(source, tmp_path / "set", 4, split_by="expert")
    result = mmsplit.export(tmp_path / "set", tmp_path / "a", part_ids=[2])
    straight = mmsplit.export(source, tmp_path / "b", 4, split_by="expert", part_ids=[2])
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for notes in (result.notes, straight.notes):
        assert any("have only the rows of this partition" in note and PACKED in note for note in notes)
    with mmsplit.open_partition(tmp_path / "set" / "partition_2.json") as partition:
        rows = partition.entry(PACKED).rows
    assert rows is not None
    whole, part = stored(source)[PACKED], stored(tmp_path / "a")[PACKED]
    assert part[1] == (rows.stop - rows.start, *whole[1][1:])
    row_bytes = len(whole[2]) // EXPERTS
    assert part[2] == whole[2][rows.start * row_bytes : rows.stop * row_bytes]
    with pytest.raises(mmsplit.RequestError, match="not all of its rows") as raised:
        mmsplit.export(tmp_path / "set", tmp_path / "c", part_ids=[1, 2])
    assert "mlp.experts" in str(raised.value.tensor)
