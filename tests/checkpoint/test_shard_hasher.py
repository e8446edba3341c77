"""SHA-256 of shards, and the name that the Hub's cache gives them."""

import hashlib
from pathlib import Path

import pytest

from mmsplit.checkpoint import ShardHasher, open_checkpoint, shard_hasher
from mmsplit.errors import CheckpointError
from mmsplit.workers import Stopped


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of 7 bytes, so that a small file has several and a last one that is shorter."""
    monkeypatch.setattr(shard_hasher, "_RANGE_BYTES", 7)


def test_digest_is_that_of_the_whole_file(tmp_path: Path, write_shard, small_ranges: None) -> None:
    """Header included, in ranges, and `go_on` is asked before each."""
    path = write_shard(tmp_path / "model.safetensors", {"a": b"x" * 100})
    asked = []
    checkpoint = open_checkpoint(tmp_path)
    with checkpoint.open_readers() as readers:
        digest = ShardHasher(checkpoint, readers, lambda: asked.append(1)).sha256(path.name)
    data = path.read_bytes()
    assert digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert len(asked) == -(-len(data) // 7)


def test_go_on_ends_the_work(tmp_path: Path, write_shard, small_ranges: None) -> None:
    path = write_shard(tmp_path / "model.safetensors", {"a": b"x"})

    def stop() -> None:
        raise Stopped

    checkpoint = open_checkpoint(tmp_path)
    with checkpoint.open_readers() as readers, pytest.raises(Stopped):
        ShardHasher(checkpoint, readers, stop).sha256(path.name)


@pytest.mark.parametrize(("name", "sound"), [("true digest", True), ("ab" * 32, False), ("0123456789", True)])
def test_blob_of_the_hub_cache_must_have_the_digest_it_is_named_by(
    tmp_path: Path, write_shard, name: str, sound: bool
) -> None:
    """Names that are no SHA-256 (files outside large-file storage) say nothing."""
    blob = write_shard(tmp_path / "blobs" / "x", {"a": b"1"})
    if name == "true digest":
        name = hashlib.sha256(blob.read_bytes()).hexdigest()
    blob = blob.rename(blob.with_name(name))
    snapshot = tmp_path / "snapshots" / "r"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    checkpoint = open_checkpoint(snapshot)
    with checkpoint.open_readers() as readers:
        hasher = ShardHasher(checkpoint, readers, lambda: None)
        if sound:
            assert hasher.sha256("model.safetensors").startswith("sha256:")
            return
        with pytest.raises(CheckpointError, match="not what the Hub has") as caught:
            hasher.sha256("model.safetensors")
    assert (caught.value.path, caught.value.expected) == (str(blob), name)
    assert caught.value.found == hashlib.sha256(blob.read_bytes()).hexdigest()
