"""A sample of the fault campaign: every scenario, every kind of fault, a few of each.  scripts/campaign has it all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

import campaign
import conditions
import damage
import pytest
from checkpoints import sample
from machine import skipped_where_not_here, without_waiting
from scenarios import BY_NAME, SCENARIOS
from trials import Outcome, Stage, crashes, failures, kills, power_losses, stage

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")


@pytest.fixture(scope="module", params=SCENARIOS, ids=lambda scenario: scenario.name)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Each scenario; at its end its source is compared with what it was."""
    os.environ["NO_PROXY"] = "127.0.0.1"
    with without_waiting(), stage(request.param, tmp_path_factory.mktemp("stage") / "stage") as made:
        yield made


def _require_none_lost(outcomes: Iterable[Outcome], *, at_least: int = 1) -> None:
    found = list(outcomes)
    assert [outcome.what for outcome in found if outcome.verdict == "lost"] == []
    assert sum(outcome.faults for outcome in found) >= at_least


def _few(made: Stage, count: int) -> int:
    """A download asks a server, which takes its time."""
    return count // 3 if made.scenario.name.startswith("download") else count


def test_crash(made: Stage) -> None:
    """Dead before or within any call that writes: whoever goes on comes to the same bytes."""
    for direct in made.ways:
        calls = sample(range(made.calls[direct]), _few(made, 15), seed=int(direct))
        _require_none_lost(crashes(made, calls, direct=direct), at_least=len(calls) - 2)


def test_power_loss(made: Stage) -> None:
    """Whatever of the unsynced survived."""
    stride = max(1, 100 // _few(made, 15))
    for direct in made.ways:
        _require_none_lost(
            power_losses(made, Random(1), direct=direct, random_states=2, take=lambda n: n % stride == 0), at_least=2
        )


def test_errors_of_the_system(made: Stage) -> None:
    """Any refusal at any call is an error of ours or does not matter, and a short write never does."""
    for direct in made.ways:
        faults = sample_of(campaign.every_failure(made, direct=direct), _few(made, 24), seed=int(direct))
        _require_none_lost(failures(made, faults, direct=direct), at_least=5)


def sample_of(faults: list, count: int, seed: int) -> list:
    return [faults[at] for at in sample(range(len(faults)), count, seed)]


def test_kill(made: Stage) -> None:
    """kill -9 at random moments."""
    _require_none_lost(kills(made, Random(2), _few(made, 9)), at_least=0)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs to know which descriptors are open")
def test_too_few_open_files(made: Stage) -> None:
    """Refused, or enough."""
    if made.scenario.name.startswith("download"):
        pytest.skip("connections wait for descriptors: in the campaign")
    _require_none_lost(conditions.few_descriptors(made, (0, 1, 3, 5, 9)))


def test_full_and_read_only_disks(made: Stage) -> None:
    """For real, on small file systems."""
    with skipped_where_not_here():
        _require_none_lost(conditions.full_disks(made, ("size=4k", "size=24k", "nr_inodes=0", "nr_inodes=3")))
        _require_none_lost(conditions.read_only(made))


def test_signals_and_failing_reads(made: Stage) -> None:
    """Calls that are interrupted all the time, and disks that cannot read."""
    if made.scenario.name.startswith("download"):
        pytest.skip("reads its input from a server")
    # To write manifests anew takes no time, and the copies of them in the payloads are read otherwise.
    at_least = 0 if made.scenario.name == "repair --rebuild-manifest" else 1
    _require_none_lost(conditions.signals(made, 1), at_least=at_least)
    _require_none_lost(conditions.read_errors(made, range(0, 12, 2)), at_least=at_least)


def test_damage_to_work_in_progress(tmp_path: Path) -> None:
    """A bit of journal, state, payload or manifest, or all behind a byte: made again, or refused."""
    with stage(BY_NAME["split --resume"], tmp_path / "stage") as made:
        strides = {".journal": 40, "unfinished_split.json": 60, "": 1500}
        _require_none_lost(damage.damaged_work(made, Random(3), strides), at_least=50)


def test_damage_to_a_set(tmp_path: Path) -> None:
    """Any bit, any length, any mixture, any forged number: found, located, at no great cost."""
    small = damage.small_set(tmp_path / "small")
    places = damage.places_in(small)
    _require_none_lost(damage.flips(small, places[::97], Random(4)), at_least=300)
    _require_none_lost(damage.truncations(small, places[::211]), at_least=100)
    _require_none_lost(damage.swaps(tmp_path / "swaps"), at_least=20)
    _require_none_lost(damage.forged_indexes(small, tmp_path / "victim", range(damage.LIES)), at_least=30)


@pytest.mark.parametrize("io", ["auto", "mmap", "pread"])
def test_a_source_that_changes(tmp_path: Path, io: str) -> None:
    """Truncated, overwritten, replaced while it is read: an error or a sound set, never a death by SIGBUS."""
    _require_none_lost(conditions.changing_sources(tmp_path, Random(5), io, 8))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits of memory are Linux's")
def test_little_memory(tmp_path: Path) -> None:
    """A gigabyte is split, verified and merged in half of it."""
    with skipped_where_not_here():
        _require_none_lost(conditions.little_memory(tmp_path / "memory", 1_000_000_000))


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A campaign of no time at all still says what it did; one that lost something ends with 1."""
    report = tmp_path / "report.md"
    assert campaign.main(["--minutes", "0", "--only", "merge", "--report", str(report), "--dir", str(tmp_path)]) == 0
    assert "| merge | crash at every call, direct | 1 | 1 | 1 | 0 | 0 |" in report.read_text()
    assert report.read_text() in capsys.readouterr().out
    monkeypatch.setattr(campaign, "crashes", lambda *_, **__: iter([Outcome("lost", "gone")]))
    assert campaign.main(["--minutes", "0", "--only", "merge", "--dir", str(tmp_path)]) == 1
    assert "* gone" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
