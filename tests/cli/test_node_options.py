"""`plan --nodes`: the table, the JSON, and what the options refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, llama_weights, write_checkpoint

from mmsplit.checkpoint.header_writer import format_header
from mmsplit.cli import run

NODES = """
[[node]]
name = "desktop"
memory = "3 GiB"
speed = 2
[[node]]
name = "idle"
memory = "1 MiB"
speed = 1
[[node]]
name = "laptop"
memory = "2 GiB"
speed = 1
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Eight blocks of attention, 1 GiB in all, as a file without blocks on disk."""
    directory = tmp_path / "model"
    directory.mkdir()
    shapes = {
        f"model.layers.{i}.self_attn.{part}_proj.weight": [4096, 4096]
        for i in range(8)
        for part in ("q", "k", "v", "o")
    }
    header = format_header((name, "BF16", shape, 2 * 4096 * 4096) for name, shape in shapes.items())
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + len(shapes) * 2 * 4096 * 4096)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """A nodes file of three machines."""
    path = tmp_path / "nodes.toml"
    path.write_text(NODES)
    return path


def plan(checkpoint: Path, nodes: Path, *options: str) -> int:
    return run(["plan", str(checkpoint), "--nodes", str(nodes), *options])


def test_table_names_nodes_needs_and_bottleneck(
    checkpoint: Path, nodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line a node, only the needs there are, and who is the fullest."""
    assert plan(checkpoint, nodes, "--context", "1000") == 0
    out, err = capsys.readouterr()
    head, *lines = [line.split() for line in out.splitlines()]
    assert " ".join(head) == "node partition layers weights kv cache needs usable fill"
    assert [line[:2] for line in lines[:3]] == [["desktop", "0"], ["idle", "-"], ["laptop", "1"]]
    assert "is the fullest:" in out
    assert "above a perfect split" in out
    assert "nothing for idle" in err


def test_json_carries_the_request(checkpoint: Path, nodes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All options arrive, and the nodes of the partitions are named."""
    options = ["--training", "lora", "--lora-rank", "8", "--context", "64", "--batch", "2", "--reserve", "0.5"]
    assert plan(checkpoint, nodes, *options, "--objective", "speed", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    placement = found["placement"]
    asked = {key: placement[key] for key in ("objective", "training", "lora_rank", "context", "batch")}
    assert asked == {"objective": "speed", "training": "lora", "lora_rank": 8, "context": 64, "batch": 2}
    assert placement["nodes"][0]["usable_bytes"] == 3 << 29
    assert [part["node"] for part in found["partitions"]] == [
        node["name"] for node in placement["nodes"] if node["part_id"] is not None
    ]
    assert plan(checkpoint, nodes, "--context", "64", "--kv-dtype", "f8_e4m3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["placement"]["kv_dtype"] == "F8_E4M3"
    assert plan(checkpoint, nodes, "--kv-dtype", "bool") == 2
    err = capsys.readouterr().err
    assert "F8_E4M3" in err
    assert "C64" not in err


def test_split_says_which_node_gets_which_partition(
    nodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As plan does; repartition, too, and both as JSON."""
    write_checkpoint(tmp_path / "small", [llama_weights(4)], files={"config.json": CAUSAL_CONFIG})
    words = ["split", str(tmp_path / "small"), "-o", str(tmp_path / "set"), "--nodes", str(nodes), "-q"]
    again = ["repartition", str(tmp_path / "set"), "-o", str(tmp_path / "again"), *words[4:]]
    for command in (words, again):
        assert run(command) == 0
        head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert head == ["node", "partition", "layers", "raw", "stored", "ratio"]
        shown = [line[:2] for line in lines[: [*lines, []].index([])]]
        assert run([*command, "--resume", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["partitions"]
        assert shown == [[part["node"], str(part["part_id"])] for part in found]
        assert "desktop" in {part["node"] for part in found}


@pytest.mark.parametrize(("objective", "column"), [("speed", "stage time"), ("share", "has of wish")])
def test_what_is_balanced_is_shown(
    checkpoint: Path, nodes: Path, capsys: pytest.CaptureFixture[str], objective: str, column: str
) -> None:
    """Where fill does not say it."""
    nodes.write_text(NODES.replace("speed", objective))
    assert plan(checkpoint, nodes, "--objective", objective) == 0
    assert capsys.readouterr().out.split("\n")[0].rstrip().endswith(column)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--context", "5"], "--context needs --nodes"),
        (["--reserve", "0.1"], "--reserve needs --nodes"),
        (["--lora-rank", "5"], "--lora-rank needs --nodes"),
        (["--nodes", "NODES", "--lora-rank", "5"], "--lora-rank needs --training lora"),
        (["--nodes", "NODES", "-n", "2"], "--nodes and --num-parts (num_parts) both say how to cut"),
        (["--nodes", "NODES", "--weights", "1,2"], "--nodes and --weights both say how to cut"),
        (["--nodes", "NODES", "--boundaries", "lm_head"], "--nodes and --boundaries both say how to cut"),
        (
            ["--nodes", "NODES", "--reserve", "5G"],
            "error: the reserve asked for is none for node 'desktop' (expected a fraction",
        ),
        (["--nodes", "NODES", "--context", "0"], "--context"),
        (["--nodes", "NODES", "--context", "100000000"], "model does not fit on these 3 nodes"),
        (["--nodes", "absent.toml"], "absent.toml: nodes file cannot be read"),
        (["--nodes", "."], "nodes file cannot be read"),
        (["--nodes", "BYTES"], "nodes file is not UTF-8"),
        (["--nodes", "LONG"], "nodes file is too long"),
    ],
)
def test_usage_errors(
    checkpoint: Path, nodes: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    """Exit code 2, one message, nothing on stdout."""
    other = nodes.with_name("other.toml")
    other.write_bytes(b"a = '\xff'" if "BYTES" in options else b"#" * ((1 << 20) + 1))
    names = {"NODES": str(nodes), "BYTES": str(other), "LONG": str(other)}
    assert run(["plan", str(checkpoint), *(names.get(word, word) for word in options)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in " ".join(err.split())
    assert "Traceback" not in err
