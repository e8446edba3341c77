"""Exports of a model on the Hub: the bytes of a local export, no more moved than needed, faults of the network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, write_checkpoint
from loopback_hub import Fault, LoopbackHub

import mmsplit
from mmsplit.errors import NetworkError
from mmsplit.exporting.export_record import RECORD_NAME
from mmsplit.remote import http_client
from mmsplit.remote.patience import Clock
from mmsplit.remote.source import HubOptions

ID = "org/model"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards, 30 MiB, a tied head."""
    layers = [
        [Weight(f"model.layers.{k}.mlp.weight", "BF16", (3, MIB)), Weight(f"model.layers.{k}.norm.bias", "F32", (7,))]
        for k in range(4)
    ]
    ends = [Weight("model.embed_tokens.weight", "BF16", (MIB,)), Weight("model.norm.weight", "BF16", (1024,))]
    shards = [[ends[0], *layers[0], *layers[1]], [*layers[2], *layers[3], ends[1]]]
    return write_checkpoint(tmp_path / "hub" / ID, shards, index=True, files={"config.json": CAUSAL_CONFIG})


@pytest.fixture
def hub(model: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(model.parent.parent) as hub:
        yield hub


@pytest.fixture
def options(hub: LoopbackHub, tmp_path: Path) -> HubOptions:
    return HubOptions(endpoint=hub.endpoint, cache_dir=tmp_path / "cache", connections=2)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts take no time."""
    monkeypatch.setattr(http_client, "Clock", lambda: Clock(sleep=lambda _: None))


def files(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name != RECORD_NAME}


@pytest.mark.parametrize("threads", [1, 8])
def test_one_partition_moves_its_own_bytes(model: Path, options: HubOptions, tmp_path: Path, threads: int) -> None:
    """The same files as from disk; what other partitions have is not fetched."""
    mmsplit.export(model, tmp_path / "local", 3, part_ids=[1], max_shard_bytes=MIB)
    result = mmsplit.export(ID, tmp_path / "out", 3, part_ids=[1], hub=options, max_shard_bytes=MIB, threads=threads)
    assert files(tmp_path / "out") == files(tmp_path / "local")
    weights = sum(file.size_bytes or 0 for file in result.files if file.name.endswith(".safetensors"))
    assert result.moved_bytes is not None
    assert result.moved_bytes < weights + 2 * MIB


def test_a_whole_model_over_a_bad_network(model: Path, hub: LoopbackHub, options: HubOptions, tmp_path: Path) -> None:
    """Connections that break are tried again; tensors cross shards and requests."""
    mmsplit.export(model, tmp_path / "local", max_shard_bytes=10 * MIB)
    hub.faults.append(Fault("drop", match="cdn GET *", after_bytes=100_000, times=4))
    mmsplit.export(ID, tmp_path / "out", hub=options, max_shard_bytes=10 * MIB)
    assert files(tmp_path / "out") == files(tmp_path / "local")


def test_json_of_a_model_on_the_hub_samples_little(options: HubOptions, tmp_path: Path) -> None:
    """How large it would be is known from a few kilobytes of some tensors."""
    estimates: list[int] = []
    with pytest.raises(mmsplit.RequestError, match="too large"):
        mmsplit.export(ID, tmp_path / "out", to="json", hub=options, max_bytes=1000, on_estimate=estimates.append)
    assert estimates[0] > 100 * MIB


def test_a_network_that_is_gone_ends_in_one_error(
    model: Path, hub: LoopbackHub, options: HubOptions, tmp_path: Path
) -> None:
    """The export stays unfinished, and goes on when the network is back."""
    checkpoint = mmsplit.open_source(ID, options)
    hub.faults.append(Fault("status", match="cdn GET *", status=404, times=-1))
    hub.faults.append(Fault("status", match="hub GET *safetensors*", status=404, times=-1))
    with pytest.raises(NetworkError):
        mmsplit.export(checkpoint, tmp_path / "out", max_shard_bytes=10 * MIB)
    assert "model.safetensors.index.json" not in files(tmp_path / "out")
    hub.clear()
    mmsplit.export(ID, tmp_path / "out", max_shard_bytes=10 * MIB, hub=options, existing="resume")
    mmsplit.export(model, tmp_path / "local", max_shard_bytes=10 * MIB)
    assert files(tmp_path / "out") == files(tmp_path / "local")


@pytest.mark.parametrize("part_id", [None, 0, 1])
def test_views_of_a_pytorch_file(tmp_path: Path, part_id: int | None) -> None:
    """Elements in another order are gathered from ranges of their own, beside those that are read ahead."""
    source = tmp_path / "hub" / "org" / "torch" / "pytorch_model.bin"
    source.parent.mkdir(parents=True)
    shutil.copy(Path(__file__).parent.parent / "checkpoint" / "torch_fixtures" / "views.zip.bin", source)
    arguments: dict[str, Any] = {"part_ids": None if part_id is None else [part_id], "max_shard_bytes": 200}
    mmsplit.export(source, tmp_path / "local", 2, **arguments)
    with LoopbackHub(tmp_path / "hub") as hub:
        options = HubOptions(endpoint=hub.endpoint, cache_dir=tmp_path / "cache", connections=2)
        mmsplit.export("org/torch", tmp_path / "out", 2, hub=options, **arguments)
    assert files(tmp_path / "out") == files(tmp_path / "local")


@pytest.mark.parametrize("keep_source", [False, True])
def test_resume_takes_files_of_the_same_commit(
    model: Path, hub: LoopbackHub, options: HubOptions, tmp_path: Path, keep_source: bool
) -> None:
    """What came from ranges is kept when the shards lie in the cache by now; another commit is another source."""
    arguments = {"max_shard_bytes": 10 * MIB, "hub": options._replace(keep_source=keep_source)}
    mmsplit.export(ID, tmp_path / "out", **arguments)
    mmsplit.download(ID, cache_dir=options.cache_dir, endpoint=hub.endpoint)
    result = mmsplit.export(ID, tmp_path / "out", existing="resume", **arguments)
    assert len(result.kept) == 4
    hub.move_main(ID, {"config.json": b"{}"})
    with pytest.raises(mmsplit.OutputExistsError, match="of another revision"):
        mmsplit.export(ID, tmp_path / "out", existing="resume", **arguments)
