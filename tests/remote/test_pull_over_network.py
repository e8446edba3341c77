"""`pull` from the Hub, a web server and fsspec: only missing bytes move, whatever the network does meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from checkpoints import CAUSAL_CONFIG, MIB, Weight, flip, tree, write_checkpoint
from loopback_fixtures import use_endpoint
from loopback_hub import MEMBER_TOKEN, Fault, LoopbackHub

from mmsplit.errors import IntegrityError, NetworkError, RemoteNotFoundError
from mmsplit.remote.source import HubOptions
from mmsplit.sidecar.layout import DATA_START
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.verbs.merge import merge
from mmsplit.verbs.pull import pull
from mmsplit.verbs.split import split
from mmsplit.verbs.verify import verify

#: Pulls in a process of its own, which kills itself when that many bytes are in place.
_CHILD = """
import os, signal, sys
from mmsplit.verbs.pull import pull
source, output, only, done_bytes = sys.argv[1:]
def die(progress):
    if progress.stage == "pull" and progress.done_bytes >= int(done_bytes):
        os.kill(os.getpid(), signal.SIGKILL)
pull(source, output, only=[int(only)], progress=die)
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of some 24 MB in three partitions."""
    root = tmp_path_factory.mktemp("published")
    weights = [Weight(f"model.layers.{k}.mlp.up_proj.weight", "BF16", (1280, 2048), 90) for k in range(9)]
    files = {"config.json": CAUSAL_CONFIG, "empty.py": b"", "sub/a b#%.txt": b"abc"}
    write_checkpoint(root / "model", [weights], files=files)
    split(root / "model", root / "set", 3)
    return root / "set"


@pytest.fixture
def set_hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """org/set and org/private hold the set, org/other has it in a folder, and so does the plain server."""
    root = tmp_path / "hub"
    for place in ("org/set", "org/private", "org/other/sets/a", "static/sets/a"):
        place_of = root / place
        place_of.parent.mkdir(parents=True, exist_ok=True)
        for name, data in tree(published).items():
            (place_of / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(published / name, place_of / name) if data else (place_of / name).write_bytes(b"")
    with LoopbackHub(root, private=["org/private"]) as hub:
        use_endpoint(monkeypatch, hub.endpoint)
        yield hub


def data_bytes(published: Path, part_id: int) -> int:
    """Bytes of a payload between its header and its index."""
    with open_partition_files(published / f"partition_{part_id}.json") as partition:
        return partition.manifest.data_stop - DATA_START


def served_bytes(hub: LoopbackHub, part: str) -> int:
    """Bytes of bodies that were sent for files whose address holds `part`."""
    return sum(request.sent_bytes for request in hub.requests if part in request.path)


def payload_of(hub: LoopbackHub, part_id: int) -> str:
    """What the address of a payload on the CDN holds."""
    repository = hub.repositories["org/set"]
    return repository.commits[repository.branches["main"]][f"partition_{part_id}.bin"].sha256


def test_one_partition_of_a_repository(set_hub: LoopbackHub, published: Path, tmp_path: Path) -> None:
    """Its own bytes move once, all of them but the header's, and not a byte of another payload."""
    result = pull("org/set", tmp_path / "out", only=[1])
    payload = published / "partition_1.bin"
    assert served_bytes(set_hub, payload_of(set_hub, 1)) == payload.stat().st_size - DATA_START
    assert served_bytes(set_hub, payload_of(set_hub, 0)) == served_bytes(set_hub, payload_of(set_hub, 2)) == 0
    assert verify(tmp_path / "out" / "partition_1.json", level="full").ok
    assert (tmp_path / "out" / "partition_1.bin").read_bytes() == payload.read_bytes()
    assert result.commit == set_hub.repositories["org/set"].branches["main"]
    served = sum(r.sent_bytes for r in set_hub.requests if "/api/models/" not in r.path and r.status in (200, 206))
    assert result.fetched_bytes == served


def test_a_whole_set_of_a_repository_merges(set_hub: LoopbackHub, published: Path, tmp_path: Path) -> None:
    """Pulled in two steps, from two spellings of the same place."""
    pull("hf://org/other:sets/a", tmp_path / "out", only=[2, 0])
    pull(f"{set_hub.endpoint}/org/other/tree/main/sets/a", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(published)
    merge(tmp_path / "out", tmp_path / "merged")
    assert tree(tmp_path / "merged") == tree(published.parent / "model")


def test_a_folder_of_a_web_server(set_hub: LoopbackHub, published: Path, tmp_path: Path) -> None:
    """No Hub is asked anything."""
    pull(set_hub.static_url("sets/a"), tmp_path / "out")
    assert tree(tmp_path / "out") == tree(published)
    assert set_hub.requests_to("hub") == []


def test_a_folder_that_fsspec_reaches(published: Path, tmp_path: Path) -> None:
    """As for s3 and its like."""
    files = fsspec.filesystem("memory")
    for name, data in tree(published).items():
        files.pipe(f"/pull/set/{name}", data)
    pull("memory://pull/set", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(published)


def test_what_is_there_costs_a_set_manifest(set_hub: LoopbackHub, published: Path, tmp_path: Path) -> None:
    """Nothing else is asked for, of the Hub or its CDN."""
    pull("org/set", tmp_path / "out")
    set_hub.clear()
    pull("org/set", tmp_path / "out")
    assert [r for r in set_hub.requests if "/api/" not in r.path and "partition_set.json" not in r.path] == []


@pytest.mark.parametrize("source", ["hub", "web"])
@pytest.mark.parametrize("done_mib", [1, 3, 5])
def test_killed_it_goes_on_with_what_is_missing(
    set_hub: LoopbackHub, published: Path, tmp_path: Path, source: str, done_mib: int
) -> None:
    """A process killed with -9, and the same command: the server's log shows that only missing bytes were sent."""
    place = "org/set" if source == "hub" else set_hub.static_url("sets/a")
    out = tmp_path / "out"
    environment = {**os.environ, "HF_ENDPOINT": set_hub.endpoint, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    words = [sys.executable, "-c", _CHILD, place, str(out), "0", str(done_mib * MIB)]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == -9, ended.stderr
    assert not (out / "partition_0.json").exists()
    set_hub.clear()
    result = pull(place, out, only=[0])
    present = result.partitions[0].present_bytes
    assert present >= done_mib * MIB - 2 * DATA_START  # the rest of "done" are bytes beside the data
    part = payload_of(set_hub, 0) if source == "hub" else "partition_0.bin"
    tail = (published / "partition_0.bin").stat().st_size - DATA_START - data_bytes(published, 0)
    asked_size = 1 if source == "web" else 0  # a web server says the length in answer to a range of one byte
    assert served_bytes(set_hub, part) == data_bytes(published, 0) - present + tail + asked_size
    assert (out / "partition_0.bin").read_bytes() == (published / "partition_0.bin").read_bytes()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop", times=3, after_bytes=500_000),
        Fault("reset", times=3, after_bytes=300_000),
        Fault("short", times=2, after_bytes=100_000),
        Fault("ignore_range", times=2),
        Fault("wrong_range", times=2),
        Fault("status", times=2, status=503, headers={"Retry-After": "0"}),
        Fault("status", times=2, status=403),
        Fault("flip", times=2),
    ],
    ids=lambda fault: f"{fault.kind}{fault.status if fault.kind == 'status' else ''}",
)
def test_faults_of_the_network_are_survived(
    set_hub: LoopbackHub, published: Path, tmp_path: Path, fault: Fault
) -> None:
    """Every fault on the CDN is mended by asking again, and a flipped bit is found by its checksum."""
    fault.match = "cdn GET *"
    set_hub.faults.append(fault)
    pull("org/set", tmp_path / "out", only=[1], hub=HubOptions(connections=2))
    assert fault.times == 0
    assert (tmp_path / "out" / "partition_1.bin").read_bytes() == (published / "partition_1.bin").read_bytes()


def test_bytes_that_are_always_flipped_are_one_error(set_hub: LoopbackHub, tmp_path: Path) -> None:
    """It says which file, tensor and byte; no partition is there."""
    set_hub.faults.append(Fault("flip", match=f"cdn GET *{payload_of(set_hub, 1)}*", times=-1))
    with pytest.raises(IntegrityError) as caught:
        pull("org/set", tmp_path / "out", only=[1])
    assert caught.value.path is not None
    assert "partition_1.bin" in caught.value.path
    assert caught.value.offset is not None
    assert not (tmp_path / "out" / "partition_1.json").exists()


def test_a_branch_that_moves_meanwhile_changes_nothing(set_hub: LoopbackHub, published: Path, tmp_path: Path) -> None:
    """Only the commit is used once it is known."""
    moved = []

    def move(progress: object) -> None:
        if not moved:
            moved.append(set_hub.move_main("org/set", {"partition_1.bin": b"other", "partition_1.json": b"{}"}))

    result = pull("org/set", tmp_path / "out", progress=move)
    assert moved
    assert result.commit != moved[0]
    assert tree(tmp_path / "out") == tree(published)


def test_a_set_that_is_half_replaced_is_refused(set_hub: LoopbackHub, tmp_path: Path) -> None:
    """A web server whose files are of two sets: one clear error, and no partition."""
    path = set_hub.static / "sets/a/partition_1.json"
    data = path.read_bytes()
    path.unlink()  # it is linked to the one that all tests share
    path.write_bytes(data)
    flip(path, 300)
    with pytest.raises(IntegrityError, match="being published right now"):
        pull(set_hub.static_url("sets/a"), tmp_path / "out", only=[1])
    assert not (tmp_path / "out" / "partition_1.bin").exists()


def test_places_without_a_set(set_hub: LoopbackHub, tmp_path: Path) -> None:
    """A model that was never split, a folder that is none, a private repository: what to do is said."""
    for place in ("org/other", "org/set:none", set_hub.static_url("none")):
        with pytest.raises(RemoteNotFoundError, match=r"no partition set there.*partition_set"):
            pull(place, tmp_path / "out")
    with pytest.raises(RemoteNotFoundError, match="private"):
        pull("org/private", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pull("org/private", tmp_path / "out", only=[0], hub=HubOptions(token=MEMBER_TOKEN))


def test_no_secret_is_written_or_said(set_hub: LoopbackHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither token nor signature, in files, results or errors."""
    hub = HubOptions(token=MEMBER_TOKEN)
    result = pull("org/private", tmp_path / "out", only=[0], hub=hub)
    set_hub.faults.append(Fault("status", match="cdn *", status=400, times=-1))
    with pytest.raises(NetworkError) as caught:
        pull("org/private", tmp_path / "out", hub=hub)
    said = json.dumps(result.as_json()) + str(caught.value) + repr(hub) + "".join(capfd.readouterr())
    written = b"".join(tree(tmp_path / "out").values())
    for secret in (MEMBER_TOKEN, "X-Amz-Signature"):
        assert secret not in said
        assert secret.encode() not in written
