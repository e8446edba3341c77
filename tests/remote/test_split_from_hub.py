"""Splits of a model on the Hub: the bytes of a local split, no more moved than needed, faults of the network."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, write_checkpoint
from huggingface_hub import hf_hub_download, snapshot_download
from loopback_hub import Fault, LoopbackHub

import mmsplit
from mmsplit.errors import IntegrityError, NetworkError, OutputExistsError
from mmsplit.remote import http_client
from mmsplit.remote.hub_storage import HubReaders
from mmsplit.remote.patience import Clock
from mmsplit.remote.source import HubOptions
from mmsplit.workers import Progress

ID = "org/model"
FILES = {"config.json": CAUSAL_CONFIG, "tokenizer.json": b'{"version": 1}', "sub/extra.json": b"[]"}


def layer(number: int) -> list[Weight]:
    """Nine tensors of 10 MiB in all: chunks of several sizes, slots of several chunks."""
    name = f"model.layers.{number}"
    return [
        Weight(f"{name}.input_layernorm.weight", "BF16", (1024,)),
        Weight(f"{name}.mlp.down_proj.weight", "BF16", (3, MIB)),
        Weight(f"{name}.self_attn.k_proj.weight", "BF16", (512, 1024)),
        Weight(f"{name}.self_attn.q_proj.weight", "BF16", (1024, 1024)),
        Weight(f"{name}.self_attn.v_proj.bias", "F32", (7,)),
    ]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three shards, 45 MiB, a tied head; layer 1 lies in two shards."""
    ends = [Weight("model.embed_tokens.weight", "BF16", (2, MIB)), Weight("model.norm.weight", "BF16", (1024,))]
    shards = [
        [ends[0], *layer(0), *layer(1)[:2]],
        [*layer(1)[2:], *layer(2)],
        [*layer(3), ends[1]],
    ]
    return write_checkpoint(tmp_path / "hub" / ID, shards, index=True, files=FILES)


@pytest.fixture
def hub(model: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(model.parent.parent) as hub:
        yield hub


@pytest.fixture
def options(hub: LoopbackHub, tmp_path: Path) -> HubOptions:
    return HubOptions(endpoint=hub.endpoint, cache_dir=tmp_path / "cache")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts take no time."""
    monkeypatch.setattr(http_client, "Clock", lambda: Clock(sleep=lambda _: None))


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture
def expected(model: Path, hub: LoopbackHub, tmp_path: Path) -> dict[str, bytes]:
    """What a local split of the same files makes, told of which model they are."""
    commit = mmsplit.open_source(ID, HubOptions(endpoint=hub.endpoint, cache_dir=tmp_path / "cache")).revision
    mmsplit.split(model, tmp_path / "local", 3, model_id=ID, revision=commit)
    return tree(tmp_path / "local")


def test_sliced_experts_from_the_hub(tmp_path: Path) -> None:
    """The published SHA-256 is that of the shards put together again from slices in several partitions."""
    weights = [*layer(0), Weight("model.layers.1.mlp.experts.up_proj", "BF16", (5, 700, 1001))]
    source = write_checkpoint(tmp_path / "hub" / ID, [weights[::2], weights[1::2]], index=True, files=FILES)
    with LoopbackHub(tmp_path / "hub") as hub:
        options = HubOptions(endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
        result = mmsplit.split(ID, tmp_path / "out", 4, split_by="expert", hub=options)
    assert result.manifest is not None
    found = {shard.name: (shard.sha256, shard.sha256_is_published) for shard in result.manifest.shards}
    for name, (digest, is_published) in found.items():
        assert (digest, is_published) == (f"sha256:{hashlib.sha256((source / name).read_bytes()).hexdigest()}", False)
    commit = result.manifest.revision
    mmsplit.split(source, tmp_path / "local", 4, split_by="expert", model_id=ID, revision=commit)
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


def test_the_same_set_as_from_disk(
    model: Path, hub: LoopbackHub, options: HubOptions, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """Down to the root digest; the tied weight is fetched once; the shards never touch the disk."""
    hub.clear()
    result = mmsplit.split(ID, tmp_path / "out", 3, hub=options)
    assert tree(tmp_path / "out") == expected
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert result.needed_bytes == mmsplit.open_checkpoint(model).total_bytes
    assert result.needed_bytes < result.moved_bytes < size + 2 * MIB
    assert not any(path.suffix == ".safetensors" for path in tmp_path.rglob("*") if model not in path.parents)
    merged = tmp_path / "merged"
    mmsplit.merge(tmp_path / "out", merged)
    assert tree(merged) == tree(model)


@pytest.mark.parametrize("only", [None, [1]])
def test_through_the_cache(
    model: Path,
    hub: LoopbackHub,
    options: HubOptions,
    expected: dict[str, bytes],
    tmp_path: Path,
    only: list[int] | None,
) -> None:
    """With keep_source whole shards are downloaded, those that are needed, and huggingface_hub finds them there."""
    kept = options._replace(keep_source=True)
    mmsplit.split(ID, tmp_path / "out", 3, only=only, hub=kept)
    made = tree(tmp_path / "out")
    assert made == (expected if only is None else {name: expected[name] for name in made})
    shards = sorted(path.name for path in (tmp_path / "cache").rglob("snapshots/*/*.safetensors"))
    assert set(shards) <= {path.name for path in model.glob("*.safetensors")}
    assert len(shards) == 3 if only is None else 0 < len(shards) < 3
    for name in shards:
        commit = mmsplit.open_source(ID, options).revision
        found = hf_hub_download(ID, name, revision=commit, cache_dir=options.cache_dir, local_files_only=True)
        assert Path(found).read_bytes() == (model / name).read_bytes()
    hub.clear()
    mmsplit.split(ID, tmp_path / "again", 3, only=only, hub=kept)
    assert tree(tmp_path / "again") == made
    assert sum(request.sent_bytes for request in hub.requests_to("cdn")) < MIB


def test_through_the_cache_over_faults(
    hub: LoopbackHub, options: HubOptions, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A flipped bit is found on arrival, and the file fetched anew; a network that stays away is one error."""
    kept = options._replace(keep_source=True)
    checkpoint = mmsplit.open_source(ID, kept)
    hub.faults.append(Fault("flip", match="cdn GET *", times=1))
    mmsplit.split(checkpoint, tmp_path / "out", 3)
    assert tree(tmp_path / "out") == expected
    checkpoint = mmsplit.open_source(ID, kept._replace(cache_dir=tmp_path / "other"))
    hub.faults.append(Fault("status", match="cdn GET *", status=404, times=-1))
    hub.faults.append(Fault("status", match="hub GET *safetensors*", status=404, times=-1))
    with pytest.raises(NetworkError):
        mmsplit.split(checkpoint, tmp_path / "away", 3)


@pytest.mark.parametrize("part_id", [0, 1, 2])
def test_one_partition_moves_its_own_bytes(
    hub: LoopbackHub, options: HubOptions, expected: dict[str, bytes], tmp_path: Path, part_id: int
) -> None:
    """And is what the whole split makes of it; neighbours are one request."""
    hub.clear()
    result = mmsplit.split(ID, tmp_path / "out", 3, only=[part_id], hub=options)
    names = {f"partition_{part_id}.json", f"partition_{part_id}.bin", *FILES}
    assert tree(tmp_path / "out") == {name: data for name, data in expected.items() if name in names}
    assert result.manifest is None
    assert result.needed_bytes == result.plan.partitions[part_id].total_bytes
    assert result.needed_bytes < result.moved_bytes < result.needed_bytes + 2 * MIB
    fetched = [request for request in hub.requests_to("cdn") if request.sent_bytes > MIB]
    assert len(fetched) <= 6
    assert mmsplit.verify(tmp_path / "out" / f"partition_{part_id}.json").ok


def test_partitions_made_one_at_a_time_become_the_set(
    options: HubOptions, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """In any order; the last one writes the set manifest, with digests of what all of them give back."""
    out = tmp_path / "out"
    for part_id in (2, 0, 1):
        assert not (out / "partition_set.json").exists()
        mmsplit.split(ID, out, 3, only=[part_id], hub=options)
    assert tree(out) == expected
    again = mmsplit.split(ID, out, 3, only=[1], existing="resume", hub=options)
    assert again.already_finished


def test_a_partition_that_is_there_is_refused_or_kept(options: HubOptions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mmsplit.split(ID, out, 3, only=[1], hub=options)
    before = tree(out)
    with pytest.raises(OutputExistsError, match="partition 1 of this split is there already"):
        mmsplit.split(ID, out, 3, only=[0, 1], hub=options)
    with pytest.raises(OutputExistsError, match="a partition of another plan"):
        mmsplit.split(ID, out, 2, only=[0], hub=options)
    assert tree(out) == before
    result = mmsplit.split(ID, out, 3, only=[1], existing="resume", hub=options)
    assert (result.needed_bytes, result.resumed_bytes) == (0, result.plan.partitions[1].total_bytes)
    assert tree(out) == before
    mmsplit.split(ID, out, 3, only=[1], existing="force", hub=options)
    assert tree(out) == before


#: Faults of the CDN that a transfer gets over by itself; they befall requests for weights as well as for headers.
PASSING = {
    "drop": Fault("drop", match="cdn GET *", after_bytes=100_000, times=3),
    "reset": Fault("reset", match="cdn GET *", after_bytes=100_000, times=3),
    "short": Fault("short", match="cdn GET *", after_bytes=50_000, times=3),
    "5xx": Fault("status", match="cdn GET *", status=503, times=3, headers={"Retry-After": "0"}),
    "expired": Fault("status", match="cdn GET *", status=403, times=2),
    "wrong range": Fault("wrong_range", match="cdn GET *", times=2),
    "ignored range": Fault("ignore_range", match="cdn GET *", times=2),
    "hub busy": Fault("status", match="hub GET *", status=429, times=2, headers={"Retry-After": "0"}),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_passing_faults_change_nothing(
    hub: LoopbackHub,
    options: HubOptions,
    expected: dict[str, bytes],
    tmp_path: Path,
    fault: Fault,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.faults.append(Fault(**vars(fault)))
    mmsplit.split(ID, tmp_path / "out", 3, hub=options)
    assert tree(tmp_path / "out") == expected


def test_flipped_bits_are_found_and_fetched_anew(
    hub: LoopbackHub, options: HubOptions, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """By the SHA-256 of the shard; nothing passes for a set; --resume fetches what came of this shard again."""
    out = tmp_path / "out"
    # The headers come first, and are held to the rules of the format; the fault is to befall the weights.
    checkpoint = mmsplit.open_source(ID, options)
    hub.faults.append(Fault("flip", match="cdn GET *", times=1))
    with pytest.raises(IntegrityError, match="not the published one") as caught:
        mmsplit.split(checkpoint, out, 3)
    assert "--resume" in str(caught.value)
    assert not (out / "partition_set.json").exists()
    hub.clear()
    mmsplit.split(ID, out, 3, existing="resume", hub=options)
    assert tree(out) == expected


def test_network_that_stays_away_ends_in_one_error(
    hub: LoopbackHub, options: HubOptions, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """The run can go on later, and does not fetch again what is there."""
    checkpoint = mmsplit.open_source(ID, options)
    out = tmp_path / "out"
    hub.faults.append(Fault("status", match="cdn GET *", status=404, times=-1))
    hub.faults.append(Fault("status", match="hub GET *safetensors*", status=404, times=-1))
    with pytest.raises(NetworkError):
        mmsplit.split(checkpoint, out, 3)
    assert not (out / "partition_set.json").exists()
    hub.clear()
    mmsplit.split(ID, out, 3, existing="resume", hub=options)
    assert tree(out) == expected


def test_main_that_moves_meanwhile(
    hub: LoopbackHub, options: HubOptions, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A run is of one commit; to go on with it, the error says which."""
    checkpoint = mmsplit.open_source(ID, options)
    out = tmp_path / "out"
    hub.faults.append(Fault("status", match="cdn GET *", status=404, times=-1))
    hub.faults.append(Fault("status", match="hub GET *safetensors*", status=404, times=-1))
    with pytest.raises(NetworkError):
        mmsplit.split(checkpoint, out, 3)
    hub.clear()
    hub.move_main(ID, {"README.md": b"news"})
    with pytest.raises(OutputExistsError, match="another revision") as caught:
        mmsplit.split(ID, out, 3, existing="resume", hub=options)
    assert f"--revision {checkpoint.revision}" in str(caught.value)
    mmsplit.split(ID, out, 3, existing="resume", hub=options._replace(revision=checkpoint.revision))
    assert tree(out) == expected


def test_killed_and_run_again(
    hub: LoopbackHub, options: HubOptions, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A process killed with -9 in the middle; the same command goes on, and fetches only what is missing."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mmsplit", "split", ID, "-o", str(out), "-n", "3", "--resume", "--json", "-t", "1"]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        while not (out / "partition_0.json").exists():
            assert child.poll() is None, child.communicate()
        os.kill(child.pid, signal.SIGKILL)
    hub.clear()
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    result = json.loads(done.stdout)
    assert result["resumed_bytes"] >= result["partitions"][0]["total_bytes"]
    assert result["needed_bytes"] + result["partitions"][0]["total_bytes"] <= result["total_bytes"]
    assert tree(out) == expected


def test_interrupt_leaves_no_connection(options: HubOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops the encoders ends the connections, too."""
    closed = []
    real = HubReaders.close

    def close(self: HubReaders) -> None:
        real(self)
        closed.append(True)

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HubReaders, "close", close)
    with pytest.raises(KeyboardInterrupt):
        mmsplit.split(ID, tmp_path / "out", 3, hub=options, progress=stop)
    assert closed == [True]


def test_verify_against_the_hub(model: Path, hub: LoopbackHub, options: HubOptions, tmp_path: Path) -> None:
    """A sound set, then one of other weights."""
    mmsplit.split(model, tmp_path / "out", 2)
    assert mmsplit.verify(tmp_path / "out", against=ID, hub=options).ok
    shard = next(model.glob("*00002*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    hub.move_main(ID, {shard.name: bytes(data)})
    result = mmsplit.verify(tmp_path / "out", against=ID, hub=options)
    assert [fault.file.rpartition("/")[2] for fault in result.problems] == [shard.name]


class Torn(Exception):  # noqa: N818 - nothing failed
    """What a run is ended with in the middle."""


def torn(after_bytes: int) -> Callable[[Progress], None]:
    """A progress callback that ends the run."""

    def callback(progress: Progress) -> None:
        if progress.done_bytes >= after_bytes:
            raise Torn

    return callback


def flip_next_weights(hub: LoopbackHub, model: Path, shard: str) -> None:
    """One bit of each block of the next request for a shard is not what it was."""
    digest = hashlib.sha256((model / shard).read_bytes()).hexdigest()
    hub.faults.append(Fault("flip", match=f"cdn GET */blobs/{digest}*", times=1))


def test_what_is_fetched_again_is_checked_again(
    model: Path, hub: LoopbackHub, options: HubOptions, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A partition that is gone takes the digests of its shards with it, although they were found right once."""
    out = tmp_path / "out"
    checkpoint = mmsplit.open_source(ID, options)
    last = sorted(shard.name for shard in checkpoint.shards)[-1]
    flip_next_weights(hub, model, last)
    with pytest.raises(IntegrityError, match="not the published one"):
        mmsplit.split(checkpoint, out, 3, tied="reference", threads=1)
    (out / "partition_0.bin").unlink()
    checkpoint = mmsplit.open_source(ID, options)
    flip_next_weights(hub, model, sorted(shard.name for shard in checkpoint.shards)[0])
    with pytest.raises(IntegrityError, match="not the published one"):
        mmsplit.split(checkpoint, out, 3, tied="reference", existing="resume")
    hub.clear()
    mmsplit.split(ID, out, 3, tied="reference", existing="resume", hub=options)
    mmsplit.merge(out, tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(model)


def test_copy_of_a_tied_weight_that_came_by_itself_is_compared(
    model: Path, hub: LoopbackHub, options: HubOptions, expected: dict[str, bytes], tmp_path: Path
) -> None:
    """A merge would never look at it; the hint says what to fetch again."""
    out = tmp_path / "out"
    mmsplit.split(ID, out, 3, only=[0, 1], hub=options)
    checkpoint = mmsplit.open_source(ID, options)
    flip_next_weights(hub, model, sorted(shard.name for shard in checkpoint.shards)[0])
    with pytest.raises(IntegrityError, match="copies of a tied weight that differ") as caught:
        mmsplit.split(checkpoint, out, 3, only=[2])
    assert "--only 0,2 --force" in str(caught.value) or "--only 0,1,2 --force" in str(caught.value)
    hub.clear()
    mmsplit.split(ID, out, 3, only=[2], existing="force", hub=options)
    assert tree(out) == expected


def test_small_file_that_arrives_wrong(hub: LoopbackHub, options: HubOptions, tmp_path: Path) -> None:
    """Once, it is fetched again; whenever it is fetched, that is an error."""
    hub.faults.append(Fault("flip", match="hub GET *tokenizer.json*", times=1))
    mmsplit.split(ID, tmp_path / "out", 3, hub=options)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    hub.faults.append(Fault("flip", match="hub GET *tokenizer.json*", times=-1))
    with pytest.raises(IntegrityError, match="not what the Hub has, twice"):
        mmsplit.split(ID, tmp_path / "other", 3, hub=options)


@pytest.mark.parametrize("keep_source", [True, False])
def test_unfinished_run_goes_on_from_shards_that_are_in_the_cache_by_now(
    hub: LoopbackHub, options: HubOptions, expected: dict[str, bytes], tmp_path: Path, keep_source: bool
) -> None:
    """The files have another identity there, and are the same."""
    out = tmp_path / "out"
    kept = options._replace(keep_source=keep_source)
    with pytest.raises(Torn):
        mmsplit.split(ID, out, 3, hub=kept, progress=torn(25 * MIB))
    snapshot_download(ID, endpoint=hub.endpoint, cache_dir=options.cache_dir)
    hub.clear()
    result = mmsplit.split(ID, out, 3, existing="resume", hub=kept)
    assert result.resumed_bytes > 0
    assert tree(out) == expected
    assert hub.requests_to("cdn") == []
