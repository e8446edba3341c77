"""GGUF files through the whole engine: every fixture splits, verifies and comes back byte for byte."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import mmsplit
from mmsplit.errors import GgufFileError, MissingShardError

sys.path.insert(0, str(Path(__file__).parent.parent / "checkpoint"))
from gguf_builder import Row, gguf_file, text

FIXTURES = Path(__file__).parent.parent / "checkpoint" / "gguf_fixtures"
WHOLE = ("llama_tied.gguf", "metadata.gguf", "mmproj.gguf", "shapes.gguf", "types.gguf")
PARTS = sorted(path.name for path in FIXTURES.glob("split-*.gguf"))


@pytest.mark.parametrize("names", [*([name] for name in WHOLE), PARTS], ids=[*WHOLE, "parts"])
def test_set_gives_the_files_back(tmp_path: Path, names: list[str]) -> None:
    """One file, or all parts of a model of which one is named."""
    source = tmp_path / "source"
    source.mkdir()
    for name in names:
        shutil.copy(FIXTURES / name, source)
    opened = mmsplit.open_checkpoint(source / names[-1])
    assert [shard.name for shard in opened.shards] == names
    parts = min(2, len(mmsplit.plan(opened, 1).partitions[0].layers))
    mmsplit.split(opened, tmp_path / "set", parts)
    result = mmsplit.verify(tmp_path / "set", level="full", against=source / names[0])
    assert result.ok, result.problems
    mmsplit.merge(tmp_path / "set", tmp_path / "merged")
    for name in names:
        assert (tmp_path / "merged" / name).read_bytes() == (source / name).read_bytes()


def test_part_of_a_model_is_no_model(tmp_path: Path) -> None:
    """The names promise four files; and so does a file that was given another name."""
    shutil.copy(FIXTURES / PARTS[1], tmp_path)
    with pytest.raises(MissingShardError, match=PARTS[0]):
        mmsplit.open_checkpoint(tmp_path)
    (tmp_path / PARTS[1]).rename(tmp_path / "renamed.gguf")
    with pytest.raises(MissingShardError, match="one of 4"):
        mmsplit.open_checkpoint(tmp_path)


def test_big_endian_file_is_refused_by_name(tmp_path: Path) -> None:
    """And nothing is left behind."""
    with pytest.raises(GgufFileError, match="big-endian"):
        mmsplit.split(FIXTURES / "big_endian.gguf", tmp_path / "set", 1)
    assert not (tmp_path / "set").exists()


#: A mixture of four experts; sizes fastest first, types F32, Q8_0 (34 bytes for 32) and Q4_K (144 for 256).
MIXTURE = {
    "token_embd.weight": ((32, 16), 0, 4 * 32 * 16),
    "blk.0.attn_norm.weight": ((32,), 0, 4 * 32),
    "blk.0.attn_q.weight": ((32, 32), 8, 34 * 32),
    "blk.0.ffn_gate_inp.weight": ((32, 4), 0, 4 * 32 * 4),
    "blk.0.ffn_up_exps.weight": ((32, 8, 4), 8, 34 * 8 * 4),
    "blk.0.ffn_down_exps.weight": ((256, 3, 4), 12, 144 * 3 * 4),
    "output_norm.weight": ((32,), 0, 4 * 32),
    "output.weight": ((32, 16), 0, 4 * 32 * 16),
}
CUTS = {
    "type": {"split_by": "type"},
    "expert": {"split_by": "expert", "num_parts": 3},
    "rule": {"rule": lambda tensor: int("exps" in tensor.name)},
}


@pytest.mark.parametrize("options", CUTS.values(), ids=CUTS)
def test_other_cuts(tmp_path: Path, options: dict[str, object]) -> None:
    """Blocks of quantised numbers are never cut: an expert is a whole number of them."""
    source = tmp_path / "mixture.gguf"
    rows = [
        Row(name, sizes, kind, data=bytes((7 * len(name) + k) % 251 for k in range(size)))
        for name, (sizes, kind, size) in MIXTURE.items()
    ]
    source.write_bytes(gguf_file(rows, {"general.architecture": (8, text("llama"))}))
    plan = mmsplit.split(source, tmp_path / "set", **options).plan
    assert mmsplit.verify(tmp_path / "set", level="full", against=source).problems == ()
    mmsplit.merge(tmp_path / "set", tmp_path / "back")
    assert (tmp_path / "back" / source.name).read_bytes() == source.read_bytes()
    with mmsplit.open_set(tmp_path / "set") as whole:
        for row in rows:
            assert whole[str(row.name)].tobytes() == row.data
    slices = [t for part in plan.partitions for layer in part.layers for t in layer.tensors if t.rows is not None]
    if "split_by" in options and options["split_by"] == "expert":
        assert [(t.name, t.rows[:2], t.size_bytes) for t in slices if t.name.startswith("blk.0.ffn_down")] == [
            ("blk.0.ffn_down_exps.weight", (0, 2), 864),
            ("blk.0.ffn_down_exps.weight", (2, 4), 864),
        ]
    else:
        assert slices == []
