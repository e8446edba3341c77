"""`--consume` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import llama_weights, tree, write_checkpoint

from mmsplit.cli import run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weights = llama_weights(4)
    return write_checkpoint(tmp_path / "model", [weights[:5], weights[5:9], weights[9:]])


def test_says_first_deletes_and_says_so(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The forecast on stderr, the result on stdout; there and back."""
    before, parts, back = tree(model), str(tmp_path / "parts"), str(tmp_path / "back")
    assert run(["split", str(model), "-o", parts, "--num-parts", "2", "--consume", "-q"]) == 0
    said = capsys.readouterr()
    assert "more disk needed" in said.err
    assert "note: after partition 1: delete" in said.err
    assert "3 shard(s) of the source deleted" in said.out
    assert run(["merge", parts, "-o", back, "--consume", "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["extra_disk_bytes"] == result["disk"]["extra_bytes"] > 0
    assert result["deleted"][-1] == "partition_set.json"
    assert tree(Path(back)) == before


@pytest.mark.parametrize("more", [["--only", "1"], ["--no-source-sha256"]])
def test_what_cannot_be_consumed_is_usage(tmp_path: Path, model: Path, more: list[str]) -> None:
    """Exit code 2, and nothing is written."""
    words = ["split", str(model), "-o", str(tmp_path / "parts"), "--num-parts", "2", "--consume", *more]
    assert run(words) == 2
    assert not (tmp_path / "parts").exists()
