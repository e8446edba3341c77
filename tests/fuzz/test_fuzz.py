"""A little of the fuzzing, always the same: every file of the corpus, then some thousand changed ones."""

from __future__ import annotations

import importlib
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from directories import DIRECTORIES
from fuzz import TARGETS, fuzz, save, warm_up
from guard import Guard, Violation, guarded
from target import CORPUS, Target, run, without_waiting
from work_in_progress import IN_PROGRESS

from mmsplit.errors import FormatError, MmsplitError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the guard needs signals")

#: Runs of each target.  Directories are written, split, verified and merged in each run.
RUNS = {target.name: 120 for target in (*DIRECTORIES, *IN_PROGRESS)} | {"parameters_json": 600}
READER_RUNS = 2500


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with without_waiting():
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_must_not_be(name: str) -> None:
    """The same cases at every run; `scripts/fuzz` goes on from there."""
    target, most = TARGETS[name], RUNS.get(name, READER_RUNS)
    warm_up(target)
    tally = fuzz(target, 0, lambda number: number < most)
    assert sum(tally.outcomes.values()) == most
    assert [finding.what for finding in tally.findings] == []
    # It does get somewhere: seeds are taken, and what is wrong is told apart.
    assert tally.outcomes["accepted"] > 0
    assert len(tally.signatures) > (5 if name != "history" else 0)


def test_the_corpus_is_small_and_every_seed_of_a_reader_is_judged() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
    for name in ("safetensors", "weights_index", "torch", "gguf"):
        assert TARGETS[name].seeds(), name


def _reads_elsewhere() -> None:
    Path("/etc/hostname").read_bytes()


def _writes_elsewhere() -> None:
    Path("/dev/null").write_bytes(b"")


def _runs_a_pickle() -> None:
    pickle.loads(b"cbuiltins\nlen\n.")


def _starts_a_process() -> None:
    os.system("true")


def _takes_memory() -> None:
    bytearray(100 << 20)


def _escapes() -> None:
    raise ValueError("not ours")


def _says_nothing() -> None:
    raise FormatError("something is wrong")


@pytest.mark.parametrize(
    "act",
    [_reads_elsewhere, _writes_elsewhere, _runs_a_pickle, _starts_a_process, _takes_memory, _escapes, _says_nothing],
)
def test_what_must_not_be_is_noticed(act: Callable[[], None]) -> None:
    """The guard sees each of them, and the fuzzer makes a finding of it."""
    target = Target("bad", lambda: {"seed": b"x"}, lambda case, _other, _random: case, lambda _: act())
    tally = fuzz(target, 0, lambda number: number < 1)
    assert len(tally.findings) == 1


def test_what_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guard.HANG_SECONDS", 0.05)
    with pytest.raises(Violation, match="still at it"), guarded(Guard()):
        time.sleep(30)


def test_a_folder_is_open_to_its_target_alone(tmp_path: Path) -> None:
    """Below the folder may be read, below "out" may be written; a link does not lead out."""
    (tmp_path / "out").mkdir()
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "link").symlink_to("/etc/hostname")
    importlib.import_module("encodings.utf_16")
    with guarded(Guard((tmp_path,), (tmp_path / "out",))):
        (tmp_path / "out" / "b").write_bytes((tmp_path / "a").read_bytes())
    for act in (
        lambda: (tmp_path / "c").write_bytes(b""),
        lambda: (tmp_path / "a").unlink(),
        lambda: os.replace(tmp_path / "out" / "b", tmp_path / "b"),
        lambda: (tmp_path / "link").read_bytes(),
        lambda: os.listdir("/"),
    ):
        with pytest.raises(Violation), guarded(Guard((tmp_path,), (tmp_path / "out",))):
            act()


def test_a_case_can_be_kept_and_run_again(tmp_path: Path) -> None:
    """What is saved of a finding is the case."""
    target = TARGETS["safetensors"]
    case = target.mutate(target.seeds()["several.safetensors"], b"", Random(1))
    bad = target._replace(check=lambda _: 1 / 0)
    finding = fuzz(bad._replace(seeds=lambda: {"x": case}), 0, lambda number: number < 1).findings[0]
    assert save(finding, tmp_path).read_bytes() == case
    with pytest.raises((MmsplitError, ZeroDivisionError)):
        run(bad, case)
