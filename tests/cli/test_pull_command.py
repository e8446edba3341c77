"""`mmsplit pull` and `mmsplit push` as commands: one call, one result on stdout, everything else on stderr."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, flip, llama_weights, tree, write_checkpoint

from mmsplit.cli import run
from mmsplit.verbs.split import split


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    write_checkpoint(root / "model", [llama_weights(3)], files={"config.json": CAUSAL_CONFIG})
    split(root / "model", root / "set", 3)
    return root / "set"


def test_pull_shows_what_it_got(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each partition, and the root digest."""
    assert run(["pull", str(published), "-o", str(tmp_path / "out"), "--only", "2,0"]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 partitions" in said
    assert json.loads((published / "partition_set.json").read_bytes())["root_digest"] in said
    assert run(["pull", str(published), "-o", str(tmp_path / "out"), "-q", "--buffered", "--connections", "2"]) == 0
    assert tree(tmp_path / "out") == tree(published)


def test_pull_as_json(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The result for programs, and nothing else on stdout."""
    assert run(["pull", str(published), "-o", str(tmp_path), "--only", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [partition["part_id"] for partition in result["partitions"]] == [1]
    assert result["num_parts"] == 3


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--only", "x"], 2),
        (["--only", "0,,1"], 2),
        (["--only", "7"], 2),
        (["--connections", "0"], 2),
        (["--root", "sha256:" + "0" * 64], 5),
    ],
)
def test_pull_refuses(published: Path, tmp_path: Path, words: list[str], code: int) -> None:
    """With the exit code of its kind, and nothing written."""
    assert run(["pull", str(published), "-o", str(tmp_path / "out"), *words]) == code
    assert not (tmp_path / "out").exists()


def test_pull_names_what_is_wrong_and_mends_it_on_demand(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 6: something is in the way, and the message says which option takes it away."""
    words = ["pull", str(published), "-o", str(tmp_path)]
    assert run(words) == 0
    flip(tmp_path / "partition_0.bin", 4100)
    assert run(words) == 6
    assert "--force" in capsys.readouterr().err
    assert run([*words, "--force"]) == 0
    assert tree(tmp_path) == tree(published)


@pytest.mark.parametrize("source", ["", "none", "./none"])
def test_pull_from_nowhere(tmp_path: Path, source: str) -> None:
    """A place that is none is a usage error."""
    assert run(["pull", source, "-o", str(tmp_path / "out")]) == 2


def test_push_asks_for_a_repository(published: Path, tmp_path: Path) -> None:
    """What is no id, and what is no set, end before anybody is asked."""
    assert run(["push", str(published), "./parts"]) == 2
    assert run(["push", str(tmp_path), "org/parts"]) == 4
