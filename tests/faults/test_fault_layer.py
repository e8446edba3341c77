"""The tools of the campaign see everything, and would notice if mmsplit were worse than it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from checkpoints import tree
from fault_layer import Crash, Fault, Layer
from machine import without_waiting
from scenarios import BY_NAME, SCENARIOS
from simulated_disk import POLICIES, SimulatedDisk
from trials import Stage, crashes, power_losses, stage

from mmsplit import durable
from mmsplit.sidecar import output_files, payload_file, shard_writer

NOTHING, EVERYTHING, NAMES, _ = POLICIES


@pytest.fixture(scope="module", params=SCENARIOS, ids=lambda scenario: scenario.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Each scenario."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    with without_waiting(), stage(request.param, tmp_path_factory.mktemp("stage") / "stage") as made:
        yield made


def test_the_layer_sees_every_change(made: Stage) -> None:
    """What it recorded, played back, is what lies on the real disk; no call of mmsplit's goes past it."""
    for direct in made.ways:
        work = made.fresh(direct=direct)
        disk = SimulatedDisk(work.out.parent)
        with Layer(work.out.parent, keep=True) as layer:
            made.scenario.act(work)
        for operation in layer.operations:
            disk.apply(operation)
        real = {name: data for name, data in tree(work.out.parent).items() if not (work.out.parent / name).is_symlink()}
        played = disk.after_power_loss(EVERYTHING, Random(0))
        assert {name: data for name, data in played.items() if isinstance(data, bytes)} == real


def _script(root: Path) -> list:
    with Layer(root, keep=True) as layer:
        (root / "a").mkdir()
        (root / "a" / "x").write_bytes(b"1" * 5000)
        fd = os.open(root / "a" / "y", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"2" * 9000, 0)
        os.fsync(fd)
        os.pwrite(fd, b"3" * 9000, 0)
        os.close(fd)
        os.replace(root / "a" / "y", root / "a" / "x")
        durable.sync_directory(root)
    return layer.operations


def test_only_what_was_synced_is_sure_to_survive(tmp_path: Path) -> None:
    """A file's content after its sync, a name after that of its directory; the rest in any combination."""
    disk = SimulatedDisk(tmp_path)
    for operation in _script(tmp_path):
        disk.apply(operation)
    assert disk.after_power_loss(NOTHING, Random(0)) == {"a": None}
    assert disk.after_power_loss(NAMES, Random(0)) == {"a": None, "a/x": b"2" * 9000}
    assert disk.after_power_loss(EVERYTHING, Random(0)) == {"a": None, "a/x": b"3" * 9000}
    states = {str(disk.after_power_loss(POLICIES[0]._replace(data=0.5, names=0.5), Random(n))) for n in range(300)}
    blocks = {b"2" * 4096 + b"3" * 4096 + b"2" * 808, b"3" * 4096 + b"2" * 4904}
    assert all(any(str(block)[2:-1] in state for state in states) for block in blocks)
    assert any("a/y" in state and "a/x" not in state for state in states)


def test_a_crash_is_the_end_of_all_writing(tmp_path: Path) -> None:
    """Neither a handler nor a `finally` changes anything after it, and the lock is free."""

    def write() -> None:
        try:
            (tmp_path / "x").write_bytes(b"12345678")
        finally:
            for change in (lambda: (tmp_path / "y").write_bytes(b""), (tmp_path / "x").unlink):
                with pytest.raises(Crash):
                    change()

    with Layer(tmp_path, Fault(1, "torn")) as layer, pytest.raises(Crash):
        write()
    assert tree(tmp_path) == {"x": b"1234"}
    assert layer.struck


def test_calls_that_the_layer_does_not_know_are_refused(tmp_path: Path) -> None:
    """So that nobody begins to use one unnoticed."""
    with Layer(tmp_path), pytest.raises(NotImplementedError, match="teach it"):
        os.truncate(tmp_path, 0)


@pytest.fixture
def split_stage(tmp_path: Path) -> Iterator[Stage]:
    with stage(BY_NAME["split"], tmp_path / "stage") as made:
        yield made


def _loses(made: Stage) -> bool:
    outcomes = power_losses(made, Random(0), direct=True, random_states=2)
    return any(outcome.verdict == "lost" for outcome in outcomes)


@pytest.mark.parametrize("missing", ["directories", "payloads", "small files"])
def test_a_missing_sync_would_be_noticed(split_stage: Stage, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """With any of its syncs left out mmsplit would lose something, and the campaign says so."""
    if missing == "directories":
        monkeypatch.setattr(durable, "sync_directory", lambda _: None)
    elif missing == "payloads":
        monkeypatch.setattr(payload_file.PayloadFile, "finish", lambda self, size: os.ftruncate(self._fd, size))
    else:
        monkeypatch.setattr(output_files, "os", _OsWithoutSync())
    assert _loses(split_stage)


class _OsWithoutSync:
    """The module `os`, without its fsync."""

    def __getattr__(self, name: str) -> object:
        return (lambda *_: None) if name == "fsync" else getattr(os, name)


def test_a_name_given_too_early_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged shard that has its name from the beginning passes for whole when it is not."""
    monkeypatch.setattr(shard_writer, "partial_path", lambda path: path)
    with stage(BY_NAME["merge"], tmp_path / "stage") as made:
        outcomes = crashes(made, range(0, made.calls[True], 3), direct=True)
        assert any(outcome.verdict == "lost" for outcome in outcomes)
