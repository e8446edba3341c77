"""`mmsplit export`: files on stdout, estimates and notes on stderr, one exit code per branch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmsplit
from mmsplit.cli import run

TINY = {
    "model.embed_tokens.weight": np.arange(64, dtype=np.float32).reshape(16, 4),
    "model.layers.0.mlp.weight": np.ones((8, 4), np.float32),
    "model.layers.1.mlp.weight": np.zeros((8, 4), np.float32),
    "model.norm.weight": np.ones(4, np.float32),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of four layers with a tied head."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    save_file(TINY, directory / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "num_hidden_layers": 2}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_json_is_the_contract(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`export --json` names every file with length and SHA-256, and says what was exported."""
    words = ["export", str(checkpoint), "-n", "2", "--part", "1", "-o", str(tmp_path / "out"), "--json"]
    assert run(words) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.keys() == {
        "path",
        "to",
        "num_parts",
        "part_ids",
        "total_params",
        "total_bytes",
        "moved_bytes",
        "files",
        "notes",
    }
    assert (shown["num_parts"], shown["part_ids"], shown["moved_bytes"]) == (2, [1], None)
    assert [file["name"] for file in shown["files"]] == ["model.safetensors", "config.json"]
    assert shown["total_bytes"] == sum((tmp_path / "out" / file["name"]).stat().st_size for file in shown["files"])
    assert all(file["sha256"].startswith("sha256:") and file["kept"] is False for file in shown["files"])
    assert run([*words[:-1], "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["kept"]


def test_a_whole_set(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table has every file; the tensors are those of the model."""
    assert run(["split", str(checkpoint), "-o", str(tmp_path / "set"), "-n", "2", "-q"]) == 0
    assert run(["export", str(tmp_path / "set"), "-o", str(tmp_path / "out"), "-q"]) == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out
    assert "whole model" in out
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == TINY.keys()
    assert all(np.array_equal(found[name], TINY[name]) for name in TINY)


def test_json_form(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How large it will be comes first, on stderr; the file reads back."""
    assert run(["export", str(checkpoint), "--to", "json", "-o", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "about " in captured.err
    assert "of JSON" in captured.err
    assert "parameters_of_partition_0.json" in captured.out
    found = mmsplit.load_partition_json(tmp_path / "out" / "parameters_of_partition_0.json")
    assert {layer.name for layer in found.layers} == TINY.keys()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--resume", "--force"], 2, "exclude each other"),
        (["--to", "gguf"], 2, "gguf"),
        (["--part", "x"], 2, "not a list of partition numbers"),
        (["--part", "0"], 2, "partitions"),
        (["-n", "2", "--part", "7"], 2, "no partition 7"),
        (["--max-shard-gb", "0"], 2, "0"),
        (["-n", "9"], 2, "partitions"),
    ],
)
def test_mistakes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    """One message on stderr, nothing on stdout, nothing written."""
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "out"), *words]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert not (tmp_path / "out").exists()


def test_json_that_is_too_large(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused without --yes."""
    monkeypatch.setattr("mmsplit.cli.export_command.DEFAULT_JSON_BYTES", 100)
    words = ["export", str(checkpoint), "--to", "json", "-o", str(tmp_path / "out")]
    assert run(words) == 2
    assert "--yes" in capsys.readouterr().err
    assert run([*words, "--yes"]) == 0


def test_output_that_is_there(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """6, and what to do."""
    words = ["export", str(checkpoint), "-o", str(tmp_path / "out")]
    assert run(words) == 0
    assert run(words) == 6
    assert "--force" in capsys.readouterr().err
    assert run([*words, "--force"]) == 0
