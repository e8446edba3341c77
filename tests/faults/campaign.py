"""The whole campaign: every part with all its faults, then, while there is time, those of chance again and again.

`scripts/campaign` runs it.  To put a new command under it, add a scenario (scenarios.py); a new kind of fault is a
function that yields outcomes, and a line in `_parts_of` or `OTHERS`.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from typing import NamedTuple

import conditions
import damage
from fault_layer import Fault
from machine import NotHere, without_waiting
from scenarios import BY_NAME, SCENARIOS
from trials import ERRORS, Outcome, Stage, Verdict, crashes, failures, kills, power_losses, stage

import mmsplit

_DISKS = ("size=4k", "size=12k", "size=20k", "size=32k", "size=48k", "size=64k", *(f"nr_inodes={n}" for n in range(9)))
_LARGE_BYTES = 25_000_000_000
_WITHOUT_LARGE_BYTES = 1_000_000_000


#: What is counted.
FIGURES = ("runs", "faults", "survived", "refused", "lost")


class Part(NamedTuple):
    """One kind of fault for one scenario.  One that `repeats` depends on chance: there is always more of it."""

    name: str
    run: Callable[[Random], Iterator[Outcome]]
    repeats: bool = False


@dataclass
class Tally:
    """What came of the trials of a part."""

    runs: int = 0
    faults: int = 0
    survived: int = 0
    refused: int = 0
    lost: int = 0
    losses: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one."""
        self.runs += 1
        self.faults += outcome.faults
        verdict: Verdict = outcome.verdict
        setattr(self, verdict, getattr(self, verdict) + 1)
        if verdict == "lost":
            self.losses.append(outcome.what)

    def join(self, other: Tally) -> None:
        """Count what another one has counted."""
        for name in FIGURES:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.losses += other.losses


def every_failure(made: Stage, *, direct: bool) -> list[Fault]:
    """Every error at every call, alone and from there on, and a short write at every call."""
    faults = []
    for at in range(made.calls[direct]):
        faults += [Fault(at, code) for code in ERRORS]
        # Python repeats a call that was interrupted, for ever if need be: EINTR comes once.
        faults += [Fault(at, code, stays=True) for code in ERRORS if code != errno.EINTR]
        faults.append(Fault(at, "short"))
    return faults


def _parts_of(made: Stage) -> Iterator[Part]:
    is_download = made.scenario.name.startswith("download")
    for direct in made.ways:
        way = "" if not made.scenario.writes_direct else ", direct" if direct else ", buffered"

        def crash(_: Random, direct: bool = direct) -> Iterator[Outcome]:
            return crashes(made, range(made.calls[direct]), direct=direct)

        def fail(_: Random, direct: bool = direct) -> Iterator[Outcome]:
            return failures(made, every_failure(made, direct=direct), direct=direct)

        def lose_power(random: Random, direct: bool = direct) -> Iterator[Outcome]:
            return power_losses(made, random, direct=direct, random_states=4)

        yield Part(f"crash at every call{way}", crash)
        yield Part(f"errors at every call{way}", fail)
        yield Part(f"power loss{way}", lose_power, repeats=True)
    yield Part("kill -9", lambda random: kills(made, random, 10 if is_download else 50), repeats=True)
    yield Part("open files", lambda _: conditions.few_descriptors(made, range(8 if is_download else 24)))
    yield Part("full disk", lambda _: conditions.full_disks(made, _DISKS))
    yield Part("read-only disk", lambda _: conditions.read_only(made))
    if not is_download:
        yield Part("signals", lambda _: conditions.signals(made, 10))
        yield Part("failing reads", lambda _: conditions.read_errors(made, range(60)))
    if made.scenario.name == "split --resume":
        strides = {".journal": 1, "unfinished_split.json": 1, "": 8}
        yield Part("damage to work in progress", lambda random: damage.damaged_work(made, random, strides))


def _parts_of_sets(folder: Path, _: int) -> Iterator[Part]:
    small = damage.small_set(folder / "small")
    places = damage.places_in(small)
    yield Part("bit flip in every byte", lambda random: damage.flips(small, places, random), repeats=True)
    yield Part("cut at every byte", lambda _: damage.truncations(small, places))
    yield Part("mixed sets", lambda _: damage.swaps(folder / "swaps"))
    yield Part("forged index", lambda _: damage.forged_indexes(small, folder / "victim", range(damage.LIES)))
    large = damage.large_set(folder / "large")
    payloads = sorted(large.glob("*.bin"))

    def flip_large(random: Random) -> Iterator[Outcome]:
        chosen = (random.choice(payloads) for _ in range(200))
        random_places = [damage.Place(path, random.randrange(path.stat().st_size)) for path in chosen]
        return damage.flips(large, random_places, random, only_its_partition=True)

    yield Part("bit flips in a large set", flip_large, repeats=True)
    for io in ("auto", "mmap", "pread"):

        def change(random: Random, io: str = io) -> Iterator[Outcome]:
            place = Path(tempfile.mkdtemp(dir=folder))
            return conditions.changing_sources(place, random, io, 40)  # type: ignore[arg-type]

        yield Part(f"source changes, --io {io}", change, repeats=True)


def _parts_of_memory(folder: Path, large_bytes: int) -> Iterator[Part]:
    yield Part("little memory", lambda _: conditions.little_memory(folder / "memory", large_bytes))


SETS_AND_SOURCES, MEMORY = "sets and sources", "little memory"
#: What is no scenario.
OTHERS = {SETS_AND_SOURCES: _parts_of_sets, MEMORY: _parts_of_memory}


class Share(NamedTuple):
    """What came of a part of the campaign: tallies by scenario and kind of fault, and what the time cut short."""

    tallies: dict[tuple[str, str], Tally]
    cut_short: list[str]


@dataclass(frozen=True)
class Job:
    """One scenario, or what is beside them, for one turn; runs in a process of its own if there are several."""

    name: str
    turn: int
    seed: int
    folder: Path
    deadline: float
    large_bytes: int

    def run(self) -> Share:
        """Run the parts: all of them in turn 0, later only those of chance, as long as there is time."""
        share = Share({}, [])
        if self.turn and time.monotonic() > self.deadline:
            return share
        place = Path(tempfile.mkdtemp(dir=self.folder))
        if self.name in OTHERS:
            self._run_parts(share, SETS_AND_SOURCES, OTHERS[self.name](place, self.large_bytes))
        else:
            with stage(BY_NAME[self.name], place / "stage") as made:
                self._run_parts(share, self.name, _parts_of(made))
        shutil.rmtree(place)
        return share

    def _run_parts(self, share: Share, scenario: str, parts: Iterator[Part]) -> None:
        for part in parts:
            if (part.repeats and time.monotonic() < self.deadline) or not self.turn:
                self._run_part(share, scenario, part)

    def _run_part(self, share: Share, scenario: str, part: Part) -> None:
        tally = share.tallies.setdefault((scenario, part.name), Tally())
        random = Random(f"{self.seed} {scenario} {part.name} {self.turn}")
        started = time.monotonic()
        try:
            for outcome in part.run(random):
                tally.add(outcome)
                if outcome.verdict == "lost":
                    _show(f"LOST  {scenario}, {part.name}: {outcome.what}")
                if time.monotonic() > self.deadline and "memory" not in part.name:
                    if not self.turn:
                        share.cut_short.append(f"{scenario}, {part.name}")
                    break
        except NotHere as reason:
            _show(f"left out  {scenario}, {part.name}: {reason}")
        took = time.monotonic() - started
        _show(f"{scenario}, {part.name}: {tally.runs} runs in {took:.0f} s, {tally.lost} lost")


def _show(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


class Campaign:
    """Runs everything once, then what depends on chance until the time is over; keeps the tallies."""

    def __init__(self, minutes: float, seed: int, only: str, jobs: int) -> None:
        self.seed = seed
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.cut_short: list[str] = []
        self._jobs = jobs
        # Those that take longest first, so that nobody waits for them in the end.
        others = [name for name in OTHERS if fnmatch(name, only) or fnmatch(SETS_AND_SOURCES, only)]
        self._names = [*others, *(s.name for s in SCENARIOS if fnmatch(s.name, only))]
        self._started = time.monotonic()
        self._deadline = self._started + 60 * minutes

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self._started

    def run(self, folder: Path, large_bytes: int) -> None:
        """Run it in a folder of its own."""
        for turn in range(10_000):
            if turn and time.monotonic() > self._deadline:
                break
            names = [name for name in self._names if not turn or name != MEMORY]
            jobs = [Job(name, turn, self.seed, folder, self._deadline, large_bytes) for name in names]
            if self._jobs == 1:
                self._gather(map(Job.run, jobs))
            else:
                with ProcessPoolExecutor(self._jobs, multiprocessing.get_context("fork")) as pool:
                    self._gather(pool.map(Job.run, jobs))

    def _gather(self, shares: Iterable[Share]) -> None:
        for share in shares:
            for key, tally in share.tallies.items():
                self.tallies.setdefault(key, Tally()).join(tally)
            self.cut_short += share.cut_short


def report(campaign: Campaign, folder: Path) -> str:
    """Return what a campaign found, as a page."""
    total = Tally()
    rows = []
    for (scenario, part), tally in campaign.tallies.items():
        total.join(tally)
        figures = f"{tally.runs:,} | {tally.faults:,} | {tally.survived:,} | {tally.refused:,} | {tally.lost:,}"
        rows.append(f"| {scenario} | {part} | {figures} |")
    figures = f"{total.runs:,} | {total.faults:,} | {total.survived:,} | {total.refused:,} | **{total.lost:,}**"
    lines = [
        "# Fault campaign",
        "",
        f"mmsplit {mmsplit.__version__}, {platform.python_implementation()} {platform.python_version()},"
        f" {platform.system()} {platform.release()}, {os.cpu_count()} processors; seed {campaign.seed};"
        f" {campaign.seconds / 60:.0f} minutes.",
        "",
        "survived: the result is that of an undisturbed run.  refused: a command said what is wrong, and was right;",
        "what went on after that came to the right result.  lost: anything else.",
        "",
        "| scenario | fault | runs | faults injected | survived | refused | lost |",
        "|---|---|---:|---:|---:|---:|---:|",
        *rows,
        f"| **all** | | {figures} |",
        "",
        *([f"Cut short by the time: {'; '.join(campaign.cut_short)}.", ""] if campaign.cut_short else []),
        *(["## Lost", "", *(f"* {loss}" for loss in total.losses), ""] if total.losses else []),
    ]
    return "\n".join(line.replace(str(folder), "…").rstrip() for line in lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign; return 0 if nothing was lost, else 1."""
    parser = argparse.ArgumentParser(description="Put mmsplit under every fault there is, and report what came of it.")
    parser.add_argument(
        "--minutes", type=float, default=25, help="how long (default 25); all of it takes two idle processors some 15"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is left to chance (default 0)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only these scenarios: 'split*', 'sets*'")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="how many processes (default: as many as processors)"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--dir", type=Path, help="where to work (default: the system's place for temporary files)")
    parser.add_argument("--small", action="store_true", help="1 GB in place of 25 GB under the limit of memory")
    options = parser.parse_args(arguments)
    os.environ["NO_PROXY"] = "127.0.0.1"
    folder = Path(tempfile.mkdtemp(prefix="mmsplit-campaign-", dir=options.dir))

    campaign = Campaign(options.minutes, options.seed, options.only, options.jobs)
    try:
        with without_waiting():
            campaign.run(folder, _WITHOUT_LARGE_BYTES if options.small else _LARGE_BYTES)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        text = report(campaign, folder)
        sys.stdout.write(text)
        if options.report:
            options.report.write_text(text)
    return 1 if any(tally.lost for tally in campaign.tallies.values()) else 0
