"""How the benchmarks measure: alternating pairs, processes of their own, caches that are checked, results as JSON.

A *comparison* runs side A and side B in turn, A B A B …, so that whatever else the machine does falls on both.  What
counts is the ratio within each pair; its median is the figure, its spread says how far to trust it.  Seconds are wall
seconds; CPU seconds are user and system time of the process and of the children it waited for (`wait4`).  Before each
run the comparison prepares the side (removes output, warms or drops caches) and after it checks the result: a run
whose result is wrong ends the benchmark, and one that should begin with cold files, or with cached ones, does not
begin before they have been seen to be so.

    python bench/harness.py --self-check    see whether all of this works on this machine
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cache
import machine

BENCH: Final = Path(__file__).resolve().parent
RESULTS: Final = BENCH / "results"
#: More than this is written only after asking, or with --yes.
_ASK_ABOVE_BYTES: Final = 4_000_000_000
#: Free space that is left alone, whatever a benchmark needs.
_SPARE_BYTES: Final = 500_000_000
#: Taken and given back by `Side.with_memory_ready`: more than any side here needs.
_READY_BYTES: Final = 6 << 30
_CACHE_ATTEMPTS: Final = 3


class BenchError(Exception):
    """The benchmark cannot go on; the message is one line for the user."""


class Run(NamedTuple):
    """One process, or one call, that was measured.  `peak_rss_bytes` is 0 where no process was started."""

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int = 0
    output: str = ""


def run_process(command: Sequence[object], *, watch: Callable[[int], object] | None = None) -> Run:
    """Run a command to its end and measure it; raises `BenchError` if it fails.

    `watch` is called with the process id, in a thread of its own, and must return when that process is gone.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=out, stderr=err, stdin=subprocess.DEVNULL, start_new_session=True)
        watcher = threading.Thread(target=watch, args=(process.pid,)) if watch is not None else None
        try:
            if watcher is not None:
                watcher.start()
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:  # interrupted: end it and what it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if watcher is not None:
                watcher.join()
        out.seek(0)
        err.seek(0)
        if process.returncode:
            lines = err.read().decode(errors="replace").strip().splitlines()
            raise BenchError(f"{_shown(words)} ended with {process.returncode}: {lines[-1] if lines else 'no message'}")
        return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out.read().decode())


def _shown(words: Sequence[str]) -> str:
    return " ".join(Path(word).name if os.sep in word and " " not in word else word for word in words[:4])


def run_call(call: Callable[[], object]) -> Run:
    """Measure a call in this process; CPU seconds are those of all its threads."""
    cpu, started = time.process_time(), time.perf_counter()
    call()
    return Run(time.perf_counter() - started, time.process_time() - cpu)


def run_side(script: str, *arguments: object) -> tuple[Run, dict[str, Any]]:
    """Run a script of bench/sides, which prints one JSON object; its own clock counts, imports left out.

    Returns the run as the script measured it, and the object: it must hold `seconds` and `cpu_seconds`.
    """
    whole = run_process([sys.executable, BENCH / "sides" / script, *arguments])
    said: dict[str, Any] = json.loads(whole.output)
    return Run(said["seconds"], said["cpu_seconds"], whole.peak_rss_bytes), said


def mmsplit_command(*words: object) -> list[object]:
    """Return the command line of mmsplit in the Python that runs the benchmark."""
    return [sys.executable, "-m", "mmsplit", *words]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: `prepare` before the clock, `run` under it, `check` after it.

    `check` raises `BenchError` if the result is not complete and correct.  `cold` are files whose pages must not be
    cached when `run` begins, `warm` are files that must be.  `size` returns the bytes that the side has stored.
    `ready_bytes` of memory are taken and given back before the clock: a virtual machine may have returned free pages
    to its host, and who takes them next waits many times as long as on a machine of one's own.
    """

    label: str
    run: Callable[[], Run]
    prepare: Callable[[], object] = lambda: None
    check: Callable[[], object] = lambda: None
    cold: Sequence[Path] = ()
    warm: Sequence[Path] = ()
    size: Callable[[], int] | None = None
    ready_bytes: int = 0

    def with_memory_ready(self) -> Side:
        """Return the same side on memory that is there."""
        return replace(self, label=f"{self.label}, memory ready", ready_bytes=_READY_BYTES)


@dataclass
class Samples:
    """What was measured of one side."""

    label: str
    runs: list[Run] = field(default_factory=list)
    stored_bytes: int | None = None
    refused: int = 0

    def median_seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    def median_cpu_seconds(self) -> float:
        return statistics.median(run.cpu_seconds for run in self.runs)

    def as_json(self) -> dict[str, object]:
        """Return every run and the summary of each column."""
        seconds = [round(run.seconds, 5) for run in self.runs]
        cpu = [round(run.cpu_seconds, 5) for run in self.runs]
        peaks = [run.peak_rss_bytes for run in self.runs]
        return {
            "label": self.label,
            "seconds": summary(seconds),
            "cpu_seconds": summary(cpu),
            "peak_rss_bytes": max(peaks) or None,
            "stored_bytes": self.stored_bytes,
            "runs_refused_for_the_state_of_the_cache": self.refused,
        }


class Comparison(NamedTuple):
    """Two sides after their pairs, on `moved_bytes` of input each."""

    name: str
    moved_bytes: int
    a: Samples
    b: Samples

    @property
    def ratios(self) -> list[float]:
        """Speed of A relative to B, pair by pair."""
        return [b.seconds / a.seconds for a, b in zip(self.a.runs, self.b.runs, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return statistics.median(self.ratios)

    def shown_ratio(self) -> str:
        """Return the ratio as the tables show it: median and range."""
        return f"{self.ratio:.2f}x ({min(self.ratios):.2f} … {max(self.ratios):.2f})"

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "moved_bytes": self.moved_bytes,
            "a": self.a.as_json(),
            "b": self.b.as_json(),
            "speed_of_a_relative_to_b": summary([round(ratio, 4) for ratio in self.ratios]),
        }


def summary(values: Sequence[float]) -> dict[str, object]:
    """Return median, minimum, maximum and the values themselves, in the order of the runs."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": list(values)}


def compare(name: str, moved_bytes: int, a: Side, b: Side, pairs: int) -> Comparison:
    """Run A B A B …, `pairs` times each."""
    comparison = Comparison(name, moved_bytes, Samples(a.label), Samples(b.label))
    for _ in range(pairs):
        _run_once(a, comparison.a)
        _run_once(b, comparison.b)
    print(_line(comparison), flush=True)
    return comparison


def measure(side: Side, times: int) -> Samples:
    """Run one side that has no peer."""
    samples = Samples(side.label)
    for _ in range(times):
        _run_once(side, samples)
    return samples


def _run_once(side: Side, samples: Samples) -> None:
    for _ in range(_CACHE_ATTEMPTS):
        side.prepare()
        cache.warm(side.warm)
        cache.drop(side.cold)
        if all(map(cache.is_cold, side.cold)) and all(map(cache.is_warm, side.warm)):
            break
        samples.refused += 1
    else:
        files = ", ".join(path.name for path in (*side.cold, *side.warm))
        wanted = "out of the page cache (is --dir a tmpfs?)" if side.cold else "into the page cache; too little memory?"
        raise BenchError(f"{side.label}: cannot get {files} {wanted}")
    _take_and_give_back(side.ready_bytes)
    run = side.run()
    side.check()
    if side.size is not None:
        samples.stored_bytes = side.size()
    samples.runs.append(run)


def _take_and_give_back(size: int) -> None:
    if size:
        with mmap.mmap(-1, size) as memory:
            for start in range(0, size, mmap.PAGESIZE):
                memory[start] = 1


def _line(comparison: Comparison) -> str:
    moved = comparison.moved_bytes

    def shown(samples: Samples) -> str:
        speed = f", {moved / samples.median_seconds() / 1e9:.2f} GB/s" if moved else ""
        return f"{samples.label} {samples.median_seconds():.3f} s{speed}, CPU {samples.median_cpu_seconds():.3f} s"

    return f"{comparison.name}: {shown(comparison.a)}  |  {shown(comparison.b)}  |  {comparison.shown_ratio()}"


# --- results ---------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A row of the table in bench/README.md: what was to be reached, what was measured, whether it was met."""

    what: str
    against: str
    target: str
    measured: str
    met: bool


@dataclass
class Result:
    """What one benchmark has found, as it is written to results/NAME.json."""

    name: str
    question: str
    input: str
    notes: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def skip(self, peer: str, why: str) -> None:
        """Say that a peer was not measured, and why."""
        self.skipped[peer] = why
        print(f"skipped: {peer}: {why}", flush=True)

    def print(self) -> None:
        """Print the targets as a table."""
        rows = [("what", "against", "target", "measured", "met")]
        rows += [(t.what, t.against, t.target, t.measured, "yes" if t.met else "NO") for t in self.targets]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        print()
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    def as_json(self, facts: Mapping[str, object]) -> dict[str, object]:
        return {
            "name": self.name,
            "question": self.question,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "input": self.input,
            **facts,
            "notes": self.notes,
            "skipped": self.skipped,
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
            "figures": self.figures,
            "targets": [target._asdict() for target in self.targets],
        }


def require_same(path: Path, original: Path) -> None:
    """Raise `BenchError` unless two files have the same bytes."""
    if subprocess.run(["cmp", "-s", path, original], check=False).returncode:
        raise BenchError(f"{path.name} is not the same as the original: its time does not count")


def missing_tools(*names: str) -> str | None:
    """Return a sentence about the first program that is not installed, or None."""
    return next((f"the program {name} is not installed" for name in names if shutil.which(name) is None), None)


# --- the frame around each script ------------------------------------------------------------------------------------


class Work:
    """Where a benchmark works: a directory of its own below --dir, which is removed whatever happens."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pairs: int = options.pairs
        self.small: bool = options.small
        base = Path(options.dir) if options.dir is not None else Path(tempfile.gettempdir())
        if not base.is_dir():
            raise BenchError(f"--dir {base} is not a directory")
        self.path = Path(tempfile.mkdtemp(prefix="mmsplit-bench-", dir=base))
        self.inputs: Path = options.inputs if options.inputs is not None else self.path / "inputs"

    def need(self, count_bytes: int) -> None:
        """Say how much will lie on the disk at once; asks the user about much, refuses what does not fit."""
        free = shutil.disk_usage(self.path).free
        gigabytes = count_bytes / 1e9
        if free < count_bytes + _SPARE_BYTES:
            needed = (count_bytes + _SPARE_BYTES) / 1e9
            raise BenchError(f"this needs {needed:.1f} GB of space in --dir, and {free / 1e9:.1f} GB are free")
        if count_bytes <= _ASK_ABOVE_BYTES or self.options.yes:
            return
        question = f"This writes up to {gigabytes:.1f} GB below --dir, and removes it at the end."
        if not sys.stdin.isatty():
            raise BenchError(f"{question} Say --yes to allow it.")
        if input(f"{question} Go on? [y/N] ").strip().lower() not in ("y", "yes"):
            raise BenchError("nothing was done")

    def clear(self, *paths: Path) -> None:
        """Remove output of the run before, and let the file system settle, outside any clock."""
        for path in paths:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        os.sync()

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pairs", type=_positive, default=5, metavar="N", help="pairs of runs (default 5)")
    made.add_argument("--dir", type=Path, help="where to work; a directory on the disk to measure (default: temp)")
    made.add_argument("--inputs", type=Path, help="keep generated checkpoints here, and use those that are here")
    made.add_argument("--small", action="store_true", help="a tenth of the input, to try it; not for figures")
    made.add_argument("--yes", action="store_true", help="do not ask before writing gigabytes")
    made.add_argument("--results", type=Path, help="directory for NAME.json (default bench/results; none if --small)")
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(bench: Callable[[Work], Result], options: argparse.Namespace) -> NoReturn:
    """Run one benchmark: work directory, result, table, exit code.  Errors become one line and exit code 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if not hasattr(os, "wait4") or not hasattr(os, "posix_fadvise"):
            raise BenchError("the benchmarks need Linux")
        _compile_mmsplit()
        with Work(options) as work:
            facts = {
                "pairs": work.pairs,
                "trial": work.small,
                "machine": machine.describe(work.path),
                "versions": machine.versions(),
            }
            result = bench(work)
            result.print()
            _write(result.as_json(facts), result.name, options)
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except OSError as error:
        sys.exit(f"bench: {error.strerror or error}: {error.filename or 'no file named'}")
    except KeyboardInterrupt:
        sys.exit("bench: interrupted")
    sys.exit(0)


def _compile_mmsplit() -> None:
    """Make the bytecode that an installed package has.

    A checkout lacks it where PYTHONDONTWRITEBYTECODE is set, and every process would compile 150 modules: 0.1 s.
    """
    found = importlib.util.find_spec("mmsplit")
    for folder in found.submodule_search_locations or () if found is not None else ():
        compileall.compile_dir(folder, quiet=2)


def _write(result: Mapping[str, object], name: str, options: argparse.Namespace) -> None:
    directory: Path | None = options.results
    if directory is None:
        if options.small:
            return
        directory = RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{name}.json.tmp"
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(directory / f"{name}.json")


# --- self-check ------------------------------------------------------------------------------------------------------


def _self_check(directory: Path) -> Iterable[tuple[str, bool]]:
    burn = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    run = run_process([sys.executable, "-c", burn])
    yield "CPU seconds of a process are counted", 0.2 <= run.cpu_seconds < 2
    run = run_process(["sh", "-c", f'"{sys.executable}" -c "{burn}"; true'])
    yield "and those of its children", 0.2 <= run.cpu_seconds < 2
    run = run_process([sys.executable, "-c", "x = bytearray(100 << 20)"])
    yield "peak memory of a process is seen", run.peak_rss_bytes >= 100 << 20
    try:
        run_process([sys.executable, "-c", "raise SystemExit('on purpose')"])
        yield "a failing process is an error", False
    except BenchError as error:
        yield "a failing process is an error", "on purpose" in str(error)
    file = directory / "file"
    file.write_bytes(os.urandom(8 << 20))
    cache.warm([file])
    yield "a file that was read is seen as cached", cache.resident_share(file) > 0.99
    cache.drop([file])
    yield "a file that was dropped is seen as cold", cache.is_cold(file)
    other = directory / "other"
    other.write_bytes(file.read_bytes()[:-1] + b"?")
    try:
        require_same(other, file)
        yield "one wrong byte is found", False
    except BenchError:
        yield "one wrong byte is found", True
    order: list[str] = []

    def side(label: str, seconds: float) -> Side:
        return Side(label, lambda: order.append(label) or Run(seconds, 0))  # type: ignore[func-returns-value]

    comparison = compare("self-check", 0, side("A", 1), side("B", 2), 3)
    yield "sides alternate", order == ["A", "B"] * 3
    yield "twice as fast is a ratio of 2", comparison.ratio == 2
    samples = Samples("never cold")
    held = Side("never cold", lambda: Run(1, 0), cold=[Path("/dev/shm") / f"mmsplit-bench-{os.getpid()}"])
    if held.cold[0].parent.is_dir():
        try:
            held.cold[0].write_bytes(bytes(1 << 20))
            _run_once(held, samples)
            yield "a run that is not cold is refused", False
        except BenchError:
            yield "a run that is not cold is refused", not samples.runs
        finally:
            held.cold[0].unlink(missing_ok=True)


def _check_all() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--self-check", action="store_true", required=True, help="see whether measuring works here")
    options.add_argument("--dir", type=Path, help="directory on the disk to measure (default: temp)")
    chosen = options.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="mmsplit-bench-", dir=chosen.dir) as directory:
        for what, passed in _self_check(Path(directory)):
            print(f"{'ok  ' if passed else 'FAIL'} {what}")
            failed += not passed
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    _check_all()
