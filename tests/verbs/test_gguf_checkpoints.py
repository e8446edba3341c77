"""GGUF files through the whole engine: every fixture splits, verifies and comes back byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import mmsplit
from mmsplit.errors import GgufFileError, MissingShardError

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
