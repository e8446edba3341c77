"""Checkpoints on the Hub: the same headers as on disk, few requests, and the cache where it has them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, llama_weights, write_checkpoint
from huggingface_hub import constants, snapshot_download
from loopback_hub import Fault, LoopbackHub

import mmsplit
from mmsplit.checkpoint import Scratch, open_checkpoint
from mmsplit.errors import CheckpointError, MissingShardError, NetworkError, OfflineError, RequestError
from mmsplit.remote import hub_storage
from mmsplit.remote.hub_storage import HubStorage
from mmsplit.remote.source import HubOptions, hub_address_of, open_source

FILES = {
    "config.json": CAUSAL_CONFIG,
    "tokenizer.json": b"{}",
    ".gitattributes": b"*.safetensors filter=lfs",
    "sample.png": b"\x89PNG",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """org/llama: three shards with an index."""
    weights = llama_weights(6)
    third = len(weights) // 3
    shards = [weights[:third], weights[third : 2 * third], weights[2 * third :]]
    return write_checkpoint(tmp_path / "repos" / "org" / "llama", shards, index=True, files=FILES)


@pytest.fixture
def hub(model: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(model.parent.parent) as hub:
        yield hub


@pytest.fixture
def options(hub: LoopbackHub, tmp_path: Path) -> HubOptions:
    return HubOptions(endpoint=hub.endpoint, cache_dir=tmp_path / "cache")


def test_the_same_checkpoint_as_on_disk(model: Path, options: HubOptions) -> None:
    """Tensors, shards, headers, config and small files; media and hidden files are left out."""
    here, there = open_checkpoint(model), open_source("org/llama", options)
    assert there.tensors == here.tensors
    assert there.config == here.config
    assert [(s.name, s.size_bytes, s.kept) for s in there.shards] == [
        (s.name, s.size_bytes, s.kept) for s in here.shards
    ]
    assert there.index_bytes == here.index_bytes
    for shard in here.shards:
        assert there.read_kept(shard.name) == here.read_kept(shard.name)
    assert there.small_files == tuple(name for name in here.small_files if name != "sample.png")
    assert there.model_id == "org/llama"
    assert there.location == f"hf://org/llama@{there.revision[:12]}"
    assert there.shards[0].location == f"hf://org/llama@{there.revision[:12]}/{there.shards[0].name}"


def test_headers_take_at_most_two_requests_a_shard(
    model: Path, hub: LoopbackHub, options: HubOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to the Hub and one to where it redirects; no more bytes than the headers and a little."""
    monkeypatch.setattr(hub_storage, "_METADATA_BYTES", 64)
    checkpoint = open_source("org/llama", options)
    shards = [request for request in hub.requests if request.server == "cdn" or ".safetensors?" in request.path + "?"]
    assert len(shards) <= 2 * len(checkpoint.shards)
    headers = sum(shard.kept_bytes for shard in checkpoint.shards)
    assert headers <= sum(request.sent_bytes for request in shards) < 2 * headers
    assert any("transferred" in note or "fetched" in note for note in checkpoint.notes)


def test_header_longer_than_the_guess_is_read_all_the_same(
    model: Path, options: HubOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_storage, "_guess_header_bytes", lambda shards, _: dict.fromkeys(shards, 50))
    assert open_source("org/llama", options).tensors == open_checkpoint(model).tensors


def test_ranges_with_and_without_announcement(model: Path, options: HubOptions) -> None:
    checkpoint = open_source("org/llama", options)
    scratch = Scratch()
    with checkpoint.open_readers() as readers:
        for tensor in list(checkpoint.tensors.values())[:4]:
            readers.announce(tensor.shard, tensor.start_offset, tensor.stop_offset)
        readers.announce(checkpoint.shards[0].name, 5, 5)  # an empty tensor needs no bytes
        for tensor in list(checkpoint.tensors.values())[:8]:
            data = (model / tensor.shard).read_bytes()[tensor.start_offset : tensor.stop_offset]
            with (
                readers.lend(tensor.shard) as reader,
                reader.borrow(tensor.start_offset, tensor.stop_offset, scratch) as view,
            ):
                assert view == data


def test_digest_that_the_hub_publishes(model: Path, options: HubOptions) -> None:
    checkpoint = open_source("org/llama", options)
    for shard in checkpoint.shards:
        assert checkpoint.published_sha256(shard.name) == hashlib.sha256((model / shard.name).read_bytes()).hexdigest()


@pytest.mark.parametrize("complete", [True, False])
def test_the_cache_is_used_where_it_has_everything(
    hub: LoopbackHub, options: HubOptions, tmp_path: Path, complete: bool
) -> None:
    """A snapshot of another tool's, of this very commit; with one shard short it does not count."""
    ignore = None if complete else ["*00002-of*"]
    snapshot = snapshot_download(
        "org/llama", endpoint=hub.endpoint, cache_dir=options.cache_dir, ignore_patterns=ignore
    )
    checkpoint = open_source("org/llama", options)
    assert checkpoint.model_id == "org/llama"
    assert checkpoint.revision == Path(snapshot).name
    assert isinstance(checkpoint.storage, HubStorage) is not complete


def test_offline_the_cache_is_all_there_is(
    hub: LoopbackHub, options: HubOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing cached: the error says what forbids the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
        open_source("org/llama", options)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot_download("org/llama", endpoint=hub.endpoint, cache_dir=options.cache_dir)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert open_source("org/llama", options).model_id == "org/llama"
    assert len(hub.requests) == before


def test_local_path_has_precedence(
    model: Path, options: HubOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_address_of("org/llama") is not None
    with pytest.raises(CheckpointError, match="no such file"):
        open_source(Path("org/llama"), options)
    (tmp_path / "org" / "llama").mkdir(parents=True)
    assert hub_address_of("org/llama") is None


def test_two_revisions_are_one_too_many(options: HubOptions) -> None:
    with pytest.raises(RequestError, match="two revisions"):
        open_source("org/llama@one", options._replace(revision="two"))
    assert hub_address_of("org/llama@one", options._replace(revision="one")) == ("org/llama", "one")


def test_token_is_not_shown() -> None:
    assert "hf_secret" not in repr(HubOptions(token="hf_secret"))


def test_shard_that_the_index_names_and_the_repository_lacks(model: Path, options: HubOptions) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()
    with LoopbackHub(model.parent.parent) as hub, pytest.raises(MissingShardError, match="1 of 3 shards"):
        open_source("org/llama", options._replace(endpoint=hub.endpoint))


def test_failing_header_is_one_error(hub: LoopbackHub, options: HubOptions) -> None:
    """One shard cannot be had: the others do not keep the command alive."""
    hub.faults.append(Fault("status", match="hub GET *00002*", status=404, times=-1))
    with pytest.raises(NetworkError):
        open_source("org/llama", options)


def test_plan_and_inspect(model: Path, options: HubOptions) -> None:
    """The plan is that of the files on disk."""
    here, there = mmsplit.plan(model, 2), mmsplit.plan("org/llama", 2, hub=options)
    assert [p.total_bytes for p in there.partitions] == [p.total_bytes for p in here.partitions]
    info = mmsplit.inspect("org/llama", hub=options).as_json()
    assert info["model_id"] == "org/llama"
    assert info["revision"] == mmsplit.inspect("org/llama", hub=options).as_json()["revision"]
    assert json.dumps(info)
