"""`repair` from the Hub, a web server and fsspec: what is damaged moves, and nothing else of any weight."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from checkpoints import CAUSAL_CONFIG, Weight, flip, tree, write_checkpoint
from loopback_fixtures import use_endpoint
from loopback_hub import MEMBER_TOKEN, Fault, LoopbackHub

from mmsplit.errors import NetworkError, RemoteNotFoundError
from mmsplit.remote.source import HubOptions
from mmsplit.sidecar.partition_reader import open_partition_files
from mmsplit.verbs.repair import repair
from mmsplit.verbs.split import split

PLACES = ("org/model", "org/set", "org/other:sets/a", "web", "memory://repair/set")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of some 14 MB in three partitions, beside its model."""
    root = tmp_path_factory.mktemp("made")
    weights = [Weight(f"model.layers.{k}.mlp.up_proj.weight", "BF16", (768, 2048), 90) for k in range(6)]
    files = {"config.json": CAUSAL_CONFIG, "sub/a b#%.txt": b"abc"}
    write_checkpoint(root / "model", [weights[:3], weights[3:]], files=files, index=True)
    split(root / "model", root / "set", 3)
    return root / "set"


@pytest.fixture
def hub(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """org/model is the model, org/set and org/private the set, org/other has it in a folder, so does the web server."""
    root = tmp_path / "hub"
    for place, content in {
        "org/model": made.parent / "model",
        "org/set": made,
        "org/private": made,
        "org/other/sets/a": made,
        "static/sets/a": made,
    }.items():
        for name in tree(content):
            (root / place / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(content / name, root / place / name)
    files = fsspec.filesystem("memory")
    for name, data in tree(made).items():
        files.pipe(f"/repair/set/{name}", data)
    with LoopbackHub(root, private=["org/private"]) as loopback:
        use_endpoint(monkeypatch, loopback.endpoint)
        yield loopback


@pytest.fixture
def damaged(made: Path, tmp_path: Path) -> Path:
    """A copy of the set that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "damaged"))


def _place(hub: LoopbackHub, place: str) -> str:
    return hub.static_url("sets/a") if place == "web" else place


def _chunk(made: Path, part_id: int, number: int) -> tuple[int, int]:
    with open_partition_files(made / f"partition_{part_id}.json") as partition:
        return partition.encoded(number)[:2]


@pytest.mark.parametrize("place", PLACES)
def test_everything_comes_back_from_anywhere(hub: LoopbackHub, damaged: Path, made: Path, place: str) -> None:
    """Chunks, a payload that is gone, a small file."""
    flip(damaged / "partition_0.bin", _chunk(made, 0, 0)[0])
    flip(damaged / "partition_0.bin", _chunk(made, 0, 1)[0])
    (damaged / "partition_1.bin").unlink()
    (damaged / "sub/a b#%.txt").unlink()
    result = repair(damaged, _place(hub, place))
    assert result.problems == ()
    assert tree(damaged) == tree(made)


@pytest.mark.parametrize("place", ["org/set", "org/other:sets/a", "web", "memory://repair/set"])
def test_manifests_come_from_a_copy(hub: LoopbackHub, damaged: Path, made: Path, place: str) -> None:
    """Those of the set and of a partition that is gone altogether."""
    for name in ("partition_set.json", "partition_2.json", "partition_2.bin"):
        (damaged / name).unlink()
    assert repair(damaged, _place(hub, place)).ok
    assert tree(damaged) == tree(made)


def test_just_the_range_of_the_chunk_moves(hub: LoopbackHub, damaged: Path, made: Path) -> None:
    """From the model its raw bytes, from the set its stored ones; the server's log shows it."""
    start, stop = _chunk(made, 1, 0)
    with open_partition_files(made / "partition_1.json") as partition:
        raw_bytes = int(partition.index[0]["raw_bytes"])
    for place, expected in (("org/model", raw_bytes), ("org/set", stop - start)):
        flip(damaged / "partition_1.bin", start + 5)
        hub.clear()
        result = repair(damaged, place)
        assert (result.ok, result.source_bytes) == (True, expected)
        large = [r.sent_bytes for r in hub.requests if r.sent_bytes >= min(expected, 100_000)]
        assert large == [expected], [(r.path, r.range, r.sent_bytes) for r in hub.requests]
    assert tree(damaged) == tree(made)


@pytest.mark.parametrize("place", ["org/model", "org/set"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop", times=2, after_bytes=500_000),
        Fault("short", times=2, after_bytes=100_000),
        Fault("wrong_range", times=2),
        Fault("status", times=2, status=503, headers={"Retry-After": "0"}),
        Fault("flip", times=2),
    ],
    ids=lambda fault: fault.kind,
)
def test_faults_of_the_network_are_survived(
    hub: LoopbackHub, damaged: Path, made: Path, fault: Fault, place: str
) -> None:
    """Asked for again; and what arrives flipped is seen by its checksum."""
    flip(damaged / "partition_2.bin", _chunk(made, 2, 0)[0])
    armed = [False]

    def arm(progress: object) -> None:
        if not armed[0]:  # when the headers are there, and the looking has begun
            armed[0] = True
            hub.faults.append(
                Fault(
                    fault.kind,
                    match="cdn GET *",
                    times=fault.times,
                    after_bytes=fault.after_bytes,
                    status=fault.status,
                    headers=fault.headers,
                )
            )

    result = repair(damaged, place, progress=arm)
    assert result.problems == ()
    assert tree(damaged) == tree(made)
    assert hub.faults[0].times == 0


def test_a_server_that_fails_leaves_the_set_as_it_was(hub: LoopbackHub, damaged: Path, made: Path) -> None:
    """Each chunk that is not there is on the list, with the reason; another source after it does the work."""
    for number in range(2):
        flip(damaged / "partition_0.bin", _chunk(made, 0, number)[0])
    before = tree(damaged)
    hub.faults.append(Fault("status", match="cdn GET *", status=400, times=-1))
    result = repair(damaged, "org/set")
    assert len(result.problems) == 2
    assert all("org/set" in fault.what for fault in result.problems)
    assert tree(damaged) == before
    assert repair(damaged, ["org/set", made.parent / "model"]).ok
    assert tree(damaged) == tree(made)


def test_a_private_copy_needs_its_token(hub: LoopbackHub, damaged: Path, made: Path) -> None:
    """Refused before anything is written; with the token it is a copy like any other."""
    flip(damaged / "partition_0.bin", _chunk(made, 0, 0)[0])
    with pytest.raises(RemoteNotFoundError):
        repair(damaged, "org/private")
    assert repair(damaged, "org/private", hub=HubOptions(token=MEMBER_TOKEN)).ok


def test_a_place_that_is_none(hub: LoopbackHub, damaged: Path) -> None:
    """A model that is not there is an error of the request's network, not a damaged set."""
    with pytest.raises(NetworkError):
        repair(damaged, "org/nothing")
