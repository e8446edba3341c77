"""`mmsplit parity`, and `--parity` of split, as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, flip, llama_weights, tree, write_checkpoint

from mmsplit.cli import run

pytest.importorskip("pyeclib")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", [llama_weights(3)], files={"config.json": CAUSAL_CONFIG})


def test_parity_of_split_is_that_of_the_command(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same files; with or without the sign; and repair uses them."""
    assert run(["split", str(model), "-o", str(tmp_path / "one"), "-n", "2", "--parity", "5%", "-q"]) == 0
    assert run(["split", str(model), "-o", str(tmp_path / "two"), "-n", "2", "-q"]) == 0
    capsys.readouterr()
    assert run(["parity", str(tmp_path / "two"), "--percent", "5", "-q"]) == 0
    said = capsys.readouterr().out
    assert "partition_1.parity" in said
    assert "made" in said
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    flip(tmp_path / "two" / "partition_1.bin", 5000)
    assert run(["verify", str(tmp_path / "two"), "-q"]) == 5
    assert run(["repair", str(tmp_path / "two"), "-q"]) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there already says so."""
    assert run(["split", str(model), "-o", str(tmp_path / "set"), "-n", "1", "--parity", "2", "-q"]) == 0
    capsys.readouterr()
    assert run(["parity", str(tmp_path / "set"), "--json", "-q"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["percent"] == 2
    assert [entry["is_new"] for entry in said["partitions"]] == [False]


@pytest.mark.parametrize("percent", ["none", "60%", "0.1", "nan", ""])
def test_what_is_no_share_is_usage(model: Path, tmp_path: Path, percent: str) -> None:
    """Before anything is written."""
    assert run(["split", str(model), "-o", str(tmp_path / "set"), "-n", "1", "--parity", percent, "-q"]) == 2
    assert not (tmp_path / "set").exists()
