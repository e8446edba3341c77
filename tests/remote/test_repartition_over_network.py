"""`repartition` of a published set: only the chunks that are needed move, and damage on the way is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from checkpoints import CAUSAL_CONFIG, Weight, llama_weights, tree, write_checkpoint
from loopback_fixtures import use_endpoint
from loopback_hub import LoopbackHub

from mmsplit.errors import IntegrityError, RemoteNotFoundError
from mmsplit.remote.source import HubOptions
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.verbs.repartition import repartition
from mmsplit.verbs.split import split

PLACES = ("org/set", "org/other:sets/a", "web", "memory://repartition/set")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three partitions with a tied head, beside its model."""
    root = tmp_path_factory.mktemp("made")
    weights = [Weight(f"model.layers.{k}.mlp.gate_proj.weight", "BF16", (768, 2048), 90) for k in range(4)]
    files = {"config.json": CAUSAL_CONFIG, "sub/a b#%.txt": b"abc"}
    write_checkpoint(root / "model", [llama_weights(4), weights], files=files, index=True)
    split(root / "model", root / "set", 3)
    return root / "set"


@pytest.fixture
def hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """org/set is the set, org/other and the web server have it in a folder."""
    root = tmp_path / "hub"
    for place in ("org/set", "org/other/sets/a", "static/sets/a"):
        for name in tree(made):
            (root / place / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(made / name, root / place / name)
    files = fsspec.filesystem("memory")
    for name, data in tree(made).items():
        files.pipe(f"/repartition/set/{name}", data)
    with LoopbackHub(root) as loopback:
        use_endpoint(monkeypatch, loopback.endpoint)
        yield loopback


@pytest.mark.parametrize("place", PLACES)
def test_gives_what_a_fresh_split_gives(hub: LoopbackHub, made: Path, tmp_path: Path, place: str) -> None:
    """From anywhere."""
    split(made.parent / "model", tmp_path / "fresh", 2)
    source = hub.static_url("sets/a") if place == "web" else place
    result = repartition(source, tmp_path / "again", 2, hub=HubOptions(connections=2))
    assert tree(tmp_path / "again") == tree(tmp_path / "fresh")
    assert (result.encoded_bytes, result.shared_bytes) == (0, 0)


def test_just_what_is_needed_moves(hub: LoopbackHub, made: Path, tmp_path: Path) -> None:
    """Of the payloads, the chunks of one partition and the chunk indexes."""
    split(made.parent / "model", tmp_path / "fresh", 5)
    hub.clear()
    result = repartition("org/set", tmp_path / "again", 5, only=[2])
    moved = sum(request.sent_bytes for request in hub.requests)
    stored = result.partitions[0].stored_bytes
    small = sum(path.stat().st_size for path in made.rglob("*") if path.suffix != ".bin")
    assert stored < moved < stored + 2 * small + 60_000
    assert moved < sum(path.stat().st_size for path in made.glob("*.bin")) // 2
    name = "partition_2.bin"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_damage_where_it_was_published_is_not_handed_on(made: Path, tmp_path: Path) -> None:
    """The error names tensor and byte."""
    with open_partition_files(made / "partition_1.json") as partition:
        start, tensor = partition.encoded(0)[0], partition.tensors[0].name
    files = fsspec.filesystem("memory")
    for name, data in tree(made).items():
        body = bytearray(data)
        if name == "partition_1.bin":
            body[start + 3] ^= 1
        files.pipe(f"/repartition/damaged/{name}", bytes(body))
    with pytest.raises(IntegrityError, match="stored bytes are damaged") as raised:
        repartition("memory://repartition/damaged", tmp_path / "out", 2)
    assert (raised.value.tensor, raised.value.offset) == (tensor, start)
    assert not (tmp_path / "out" / "partition_set.json").exists()


def test_no_set_there(hub: LoopbackHub, tmp_path: Path) -> None:
    """Neither is a place that does not exist."""
    with pytest.raises(RemoteNotFoundError):
        repartition("org/none", tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
