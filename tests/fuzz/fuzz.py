"""The fuzzer: changes files of the corpus by chance, runs the readers on them, and keeps what should not be.

`scripts/fuzz` runs it; README.md beside this file says how to read what it says, and how to add a target.
"""

from __future__ import annotations

import argparse
import gc
import io
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from directories import DIRECTORIES
from guard import MOST_BYTES
from readers import READERS
from sealing import Parts, sealed, write_files
from target import Outcome, Target, run, without_waiting
from work_in_progress import IN_PROGRESS

TARGETS = {target.name: target for target in (*READERS, *DIRECTORIES, *IN_PROGRESS)}
#: So many cases are kept at most.
_MOST_KEPT = 400
#: Of so many runs one has its memory counted, which makes it several times slower.
_COUNTED_EVERY = 4


class Finding(NamedTuple):
    """What went wrong, and the case that brings it about.  `number` counts runs from 0."""

    target: str
    number: int
    what: str
    where: str
    case: Any


class Tally(NamedTuple):
    """What came of a target.  `kept` are cases whose outcome was new; they are changed again, as the seeds are."""

    outcomes: Counter[str]
    signatures: set[str]
    kept: list[Any]
    findings: list[Finding]


def fuzz(target: Target, seed: int, go_on: Callable[[int], bool]) -> Tally:
    """Run a target's seeds, then changed cases, for as long as `go_on` says, given the number of runs so far."""
    tally = Tally(Counter(), set(), [], [])
    seen: set[str] = set()
    for number, case in _cases(target, Random(f"{seed} {target.name}"), tally):
        if not go_on(number):
            break
        try:
            outcome = run(target, case, most_bytes=None if number % _COUNTED_EVERY else MOST_BYTES)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            where = _where(error)
            tally.outcomes["FINDING"] += 1
            if where not in seen:
                seen.add(where)
                what = "".join(traceback.format_exception(error))
                tally.findings.append(Finding(target.name, number, what, where, case))
            continue
        tally.outcomes[outcome.kind] += 1
        _keep(outcome, case, tally)
    return tally


def _keep(outcome: Outcome, case: Any, tally: Tally) -> None:
    key = f"{outcome.kind} {outcome.signature}"
    if key not in tally.signatures and len(tally.signatures) < _MOST_KEPT:
        tally.signatures.add(key)
        tally.kept.append(case)


def _cases(target: Target, random: Random, tally: Tally) -> Iterator[tuple[int, Any]]:
    seeds = list(target.seeds().values())
    yield from enumerate(seeds)
    for number in count(len(seeds)):
        pool = [*seeds, *tally.kept]
        # Seeds lead further than what was refused already.
        case = random.choice(seeds if random.random() < 0.6 else pool)
        for _ in range(random.choice((1, 1, 1, 2))):
            case = target.mutate(case, random.choice(seeds), random)
        yield number, case


def _where(error: BaseException) -> str:
    """What tells one finding from another: kind, and the last place in mmsplit."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/mmsplit/" in frame.filename and "/tests/" not in frame.filename]
    last = (ours or frames)[-1]
    return f"{type(error).__name__} {last.filename.rpartition('/mmsplit/')[2]}:{last.name} {str(error)[:40]}"


def save(finding: Finding, folder: Path) -> Path:
    """Write the case of a finding into a folder: a file, or a directory."""
    place = folder / f"{finding.target}-{finding.number}"
    if isinstance(finding.case, bytes):
        place.write_bytes(finding.case)
        return place
    files = sealed(finding.case) if isinstance(finding.case, Parts) else finding.case
    for name, data in files.items():
        try:
            write_files(place, {name: data})
        except (OSError, ValueError):
            continue
    return place


def main(arguments: list[str] | None = None) -> int:
    """Fuzz; return 0 if nothing was found, else 1."""
    parser = argparse.ArgumentParser(description="Run the readers on hostile files, and report what should not be.")
    parser.add_argument("target", choices=[*TARGETS, "all"], help="what to run")
    parser.add_argument("--seconds", type=float, default=60, help="how long, all targets together (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is left to chance (default 0)")
    parser.add_argument("--findings", type=Path, metavar="DIR", help="where to write cases (default: a new directory)")
    options = parser.parse_args(arguments)
    names = list(TARGETS) if options.target == "all" else [options.target]
    folder = options.findings or Path(tempfile.mkdtemp(prefix="mmsplit-findings-"))
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a finding may be about what is no text
    found = 0
    with without_waiting():
        for name in names:
            target, deadline = TARGETS[name], time.monotonic() + options.seconds / len(names)
            warm_up(target)
            started = time.monotonic()
            tally = fuzz(target, options.seed, lambda _, deadline=deadline: time.monotonic() < deadline)
            sys.stdout.write(f"{name}: {_summary(tally)}, {time.monotonic() - started:.0f} s\n")
            sys.stdout.flush()
            for finding in tally.findings:
                sys.stdout.write(f"\n{name}, run {finding.number}, {save(finding, folder)}\n{finding.what}\n")
            sys.stdout.flush()
            found += len(tally.findings)
            gc.collect()
    return 1 if found else 0


def _summary(tally: Tally) -> str:
    runs, accepted = sum(tally.outcomes.values()), tally.outcomes["accepted"]
    refused = runs - accepted - tally.outcomes["FINDING"]
    counted = f"{accepted:,} accepted, {refused:,} refused in {len(tally.signatures):,} ways"
    return f"{runs:,} runs, {counted}, {len(tally.findings)} findings"


def warm_up(target: Target) -> None:
    """Run the seeds once unguarded: whatever is imported late is imported then."""
    for case in target.seeds().values():
        try:
            run(target, case)
        except AssertionError:
            continue
        except Exception:  # what is wrong with a seed is found when it is its turn
            continue


if __name__ == "__main__":
    sys.exit(main())
