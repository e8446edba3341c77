"""`--split-by` and `--rule`: the table, the JSON, and what the options refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmsplit.checkpoint.header_writer import format_header
from mmsplit.cli import run

RULES = '[[rule]]\nmatch = "*.experts.*"\npartition = 1\n[[rule]]\nmatch = "*"\npartition = 0\n'


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two blocks of a mixture of eight, packed, as a file without blocks on disk."""
    directory = tmp_path / "model"
    directory.mkdir()
    shapes = {"model.embed_tokens.weight": [1000, 64]}
    for k in range(2):
        shapes[f"model.layers.{k}.self_attn.q_proj.weight"] = [64, 64]
        shapes[f"model.layers.{k}.mlp.gate.weight"] = [8, 64]
        shapes[f"model.layers.{k}.mlp.experts.up_proj"] = [8, 64, 256]
    header = format_header((name, "U8", shape, _product(shape)) for name, shape in shapes.items())
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(map(_product, shapes.values())))
    return directory


def _product(shape: list[int]) -> int:
    size = 1
    for count in shape:
        size *= count
    return size


def test_plan_by_expert(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table says which experts, the JSON which rows."""
    assert run(["plan", str(checkpoint), "--split-by", "expert", "-n", "3"]) == 0
    out = capsys.readouterr().out
    assert "trunk: model.embed_tokens … lm_head" in out
    assert "experts 4-7: model.layers.0.mlp.experts … model.layers.1.mlp.experts" in out
    assert "experts balanced by bytes: partition 1 is the bottleneck, 0.0 %" in out
    assert run(["plan", str(checkpoint), "--split-by", "expert", "--weights", "3,1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["partitions"][2]["layers"][0]["rows"] == {"model.layers.0.mlp.experts.up_proj": [6, 8]}
    assert (plan["split_by"], plan["partitions"][2]["label"]) == ("expert", "experts 6-7")


def test_plan_by_type(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is not balanced is not said to be."""
    assert run(["plan", str(checkpoint), "--split-by", "type"]) == 0
    out = capsys.readouterr().out
    assert "attention: model.layers.0.self_attn.q_proj … model.layers.1.self_attn.q_proj" in out
    assert "cut by type, not balanced: partition 2 is the largest" in out


def test_split_by_rule(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text(RULES)
    parts = tmp_path / "parts"
    assert run(["split", str(checkpoint), "-o", str(parts), "--rule", str(rules), "-q"]) == 0
    assert run(["inspect", str(parts / "partition_1.json")]) == 0
    assert "model.layers.0 … 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split-by", "expert"], "into how many partitions is not said"),
        (["--split-by", "type", "-n", "9"], "embedding, attention, experts"),
        (["--split-by", "type", "--rule", "rules.toml"], "--rule and --split-by (split_by) both say how to cut"),
        (["--rule", "none.toml"], "rules file cannot be read"),
        (["--rule", "latin.toml"], "rules file is not UTF-8"),
        (["--rule", "bad.toml"], "rule 1 has an unknown field"),
        (["--split-by", "type", "--nodes", "nodes.toml"], "--nodes and --split-by (split_by) both say how to cut"),
        (["--rule", "rules.toml", "--nodes", "nodes.toml"], "--nodes and --rule both say how to cut"),
        (["--split-by", "half"], "'half' is not one of"),
    ],
)
def test_what_is_refused(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """Exit code 2 and one clear sentence."""
    monkeypatch.chdir(tmp_path)
    Path("rules.toml").write_text(RULES)
    Path("bad.toml").write_text("[[rule]]\nmatches = 1")
    Path("latin.toml").write_bytes(b"# caf\xe9")
    Path("nodes.toml").write_text('[[node]]\nname = "a"\nmemory = "1 GiB"')
    assert run(["plan", str(checkpoint), *arguments]) == 2
    assert message in capsys.readouterr().err
