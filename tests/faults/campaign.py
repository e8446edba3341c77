"""The whole campaign: every part with all its faults, then, while there is time, those of chance again and again.

`scripts/campaign` runs it.  To put a new command under it, add a scenario (scenarios.py); a new kind of fault is a
function that yields outcomes, and a line in `_parts_of` or `_other_parts`.
"""

from __future__ import annotations

import argparse
import errno
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from random import Random
from typing import NamedTuple

import conditions
import damage
from fault_layer import Fault
from machine import NotHere, without_waiting
from scenarios import SCENARIOS, Scenario
from trials import ERRORS, Outcome, Stage, Verdict, crashes, failures, kills, power_losses, stage

import mmsplit

_DISKS = ("size=4k", "size=12k", "size=20k", "size=32k", "size=48k", "size=64k", *(f"nr_inodes={n}" for n in range(9)))
_LARGE_BYTES = 25_000_000_000
_WITHOUT_LARGE_BYTES = 1_000_000_000


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


def _other_parts(folder: Path, large_bytes: int) -> Iterator[Part]:
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
    yield Part("little memory", lambda _: conditions.little_memory(folder / "memory", large_bytes))


class Campaign:
    """Runs parts, keeps the tallies, and knows when to end."""

    def __init__(self, minutes: float, seed: int, only: str, show: Callable[[str], None]) -> None:
        self.seed = seed
        self.tallies: dict[tuple[str, str], Tally] = {}
        self.cut_short: list[str] = []
        self._only = only
        self._show = show
        self._started = time.monotonic()
        self._deadline = self._started + 60 * minutes

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self._started

    def run(self, folder: Path, large_bytes: int) -> None:
        """Everything once, then what depends on chance until the time is over."""
        stages = [scenario for scenario in SCENARIOS if self._is_wanted(scenario.name)]
        for scenario in stages:
            self._scenario(scenario, folder, 0)
        if self._is_wanted("sets and sources"):
            for part in _other_parts(self._folder(folder), large_bytes):
                self._part("sets and sources", part, 0)
        for turn in range(1, 10_000):
            if time.monotonic() > self._deadline:
                break
            for scenario in stages:
                self._scenario(scenario, folder, turn)
            if self._is_wanted("sets and sources"):
                for part in _other_parts(self._folder(folder), large_bytes):
                    if part.repeats:
                        self._part("sets and sources", part, turn)

    def _is_wanted(self, name: str) -> bool:
        return fnmatch(name, self._only)

    def _folder(self, folder: Path) -> Path:
        return Path(tempfile.mkdtemp(dir=folder))

    def _scenario(self, scenario: Scenario, folder: Path, turn: int) -> None:
        if turn and time.monotonic() > self._deadline:
            return
        place = self._folder(folder)
        with stage(scenario, place / "stage") as made:
            for part in _parts_of(made):
                if part.repeats or turn == 0:
                    self._part(scenario.name, part, turn)
        shutil.rmtree(place)

    def _part(self, scenario: str, part: Part, turn: int) -> None:
        if turn and time.monotonic() > self._deadline:
            return
        tally = self.tallies.setdefault((scenario, part.name), Tally())
        random = Random(f"{self.seed} {scenario} {part.name} {turn}")
        try:
            for outcome in part.run(random):
                tally.add(outcome)
                if outcome.verdict == "lost":
                    self._show(f"LOST  {scenario}, {part.name}: {outcome.what}")
                if time.monotonic() > self._deadline and "memory" not in part.name:
                    self.cut_short.append(f"{scenario}, {part.name}") if not turn else None
                    break
        except NotHere as reason:
            self._show(f"left out  {scenario}, {part.name}: {reason}")
        self._show(f"{self.seconds:7.0f} s  {scenario}, {part.name}: {tally.runs} runs, {tally.lost} lost")


def report(campaign: Campaign, folder: Path) -> str:
    """Return what a campaign found, as a page."""
    total = Tally()
    rows = []
    for (scenario, part), tally in campaign.tallies.items():
        for name in ("runs", "faults", "survived", "refused", "lost"):
            setattr(total, name, getattr(total, name) + getattr(tally, name))
        figures = f"{tally.runs:,} | {tally.faults:,} | {tally.survived:,} | {tally.refused:,} | {tally.lost:,}"
        rows.append(f"| {scenario} | {part} | {figures} |")
    figures = f"{total.runs:,} | {total.faults:,} | {total.survived:,} | {total.refused:,} | **{total.lost:,}**"
    losses = [loss for tally in campaign.tallies.values() for loss in tally.losses]
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
        *(["## Lost", "", *(f"* {loss}" for loss in losses), ""] if losses else []),
    ]
    return "\n".join(line.replace(str(folder), "…").rstrip() for line in lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign; return 0 if nothing was lost, else 1."""
    parser = argparse.ArgumentParser(description="Put mmsplit under every fault there is, and report what came of it.")
    parser.add_argument(
        "--minutes", type=float, default=20, help="how long (default 20); all of it took 15 on two processors"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is left to chance (default 0)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only these scenarios: 'split*', 'sets*'")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--dir", type=Path, help="where to work (default: the system's place for temporary files)")
    parser.add_argument("--small", action="store_true", help="1 GB in place of 25 GB under the limit of memory")
    options = parser.parse_args(arguments)
    os.environ["NO_PROXY"] = "127.0.0.1"
    folder = Path(tempfile.mkdtemp(prefix="mmsplit-campaign-", dir=options.dir))

    def show(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    campaign = Campaign(options.minutes, options.seed, options.only, show)
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
